"""Every method on Fashion MNIST, 60,000 real images, with three seeds, and PSM with other settings:

    python -m benchmarks.fashion_experiments --jobs 2

First every method is tuned on the same small grid, by kNN on training images that are held out;
then each configuration is trained with each seed and measured on the test images. Runs that are
there already are not repeated. benchmarks.report puts the tables of benchmarks/results/fashion.json
into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from benchmarks.digits_experiments import run, spread
from benchmarks.machine import ROOT, machine, provenance
from benchmarks.report import STORED
from benchmarks.tables import markdown
from psm_kernels.evaluate import encode, knn_accuracy, linear_probe
from psm_kernels.training.data import load_views

sys.path.insert(0, str(ROOT))
import train

GRID = {"temperature": (0.1, 0.2, 0.5), "lr": (0.1, 0.3)}
TUNED_WITH = ["--epochs", "2", "--limit", "30000", "--holdout", "10000"]
METHODS = {
    "PSM": "psm",
    "InfoNCE": "infonce",
    "HCL": "hcl",
    "SSCL": "sscl",
    "UnReMix": "unremix",
    "NNCLR": "nnclr",
    "ReSSL": "ressl",
    "MSF": "msf",
    "SupCon (with labels)": "supcon",
}
VARIANTS = {  # of PSM, whose own settings are K = 4,096 and a = 0.5
    "PSM, K = 16,384": ["--bank", "16384"],
    "PSM, K = 60,000, indexed": ["--indexed-bank"],
    "PSM, a = 0": ["--a", "0"],
    "PSM, a = 2": ["--a", "2"],
    "PSM, a = 8": ["--a", "8"],
    "PSM, PNSM off": ["--selection", "all"],
}


class Trainer:
    """Runs of train.py, some at a time; those that are there are read."""

    def __init__(self, folder: Path, data_dir: str, jobs: int, common: list[str]):
        self.folder, self.data_dir, self.pool = folder, data_dir, ThreadPoolExecutor(jobs)
        self.threads = max(1, os.cpu_count() // jobs)
        self.common = ["--data", "fashionmnist", "--data-dir", data_dir, "--no-probe", *common]

    def start(self, place: str, options: list[str], *, scored: bool = False):
        """A future of result, history and, where wanted, the scores of its encoder."""

        def work():
            found = run(self.folder, place, [*self.common, *options], self.threads)
            return (*found, score(self.folder / place, self.data_dir) if scored else None)

        return self.pool.submit(work)


def tune(trainer: Trainer) -> dict[str, dict[str, float]]:
    """The point of the grid with the best kNN on held-out images, by method."""
    started = {}
    for method in METHODS.values():
        grid = {k: v for k, v in GRID.items() if k != "temperature" or method != "msf"}
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            options = ["--method", method, *as_options(point), *TUNED_WITH]
            name = "-".join(map(str, ("tune", method, *values)))
            started[method, tuple(point.items())] = trainer.start(name, options)
    scores = {key: future.result()[0]["knn"] for key, future in started.items()}
    best = {}
    for (method, point), score in scores.items():
        if method not in best or score > best[method]["knn"]:
            best[method] = {**dict(point), "knn": score}
    return best


def as_options(point: dict[str, float]) -> list[str]:
    return [word for name, value in point.items() for word in (f"--{name}", str(value))]


# --- how good the features are -------------------------------------------------------------------


def score(place: Path, data_dir: str) -> dict[str, float]:
    """Of the encoder that a run has trained; kept next to the run."""
    kept = place / "scores.json"
    if not kept.exists():
        settings = train.Settings(**json.loads((place / "settings.json").read_text()))
        networks = train.Networks(settings)
        parts = {"encoder": networks.encoder}
        train.load_checkpoint(place / "checkpoint.pt", parts)
        kept.write_text(json.dumps(accuracy(networks.encoder[0], data_dir)))
    return json.loads(kept.read_text())


def accuracy(module: nn.Module, data_dir: str) -> dict[str, float]:
    """kNN with the protocol's 200 neighbors and with 20, and a linear probe, on the test images."""
    torch.set_num_threads(1)
    _, train_set, test_set = load_views("fashionmnist", data_dir, 28)
    sets = *encode(module, train_set.batches(256)), *encode(module, test_set.batches(256))
    return {
        "knn": knn_accuracy(*sets),
        "knn_20": knn_accuracy(*sets, k=20),
        "linear": linear_probe(*sets, max_iter=100),
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-dir", default="data", help="as train.py's")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion_experiments"))
    parser.add_argument("--results", type=Path, default=STORED / "fashion.json")
    parser.add_argument("--finished", action="store_true", help="train no more, show what is there")
    parser.add_argument("rest", nargs="*", help="after --: more options for train.py")
    args = parser.parse_args(words)
    if args.finished and not any(args.runs.glob("PSM-?/scores.json")):
        parser.error(f"--finished: got no finished runs of PSM in {args.runs}")
    trainer = Trainer(args.runs, args.data_dir, args.jobs, args.rest)

    best = tune(trainer)
    found = {}
    for seed in args.seeds:  # seed by seed: an early look compares all configurations
        for name, method, more in (
            *((name, method, []) for name, method in METHODS.items()),
            *((name, "psm", more) for name, more in VARIANTS.items()),
        ):
            point = {k: v for k, v in best[method].items() if k != "knn"}
            options = ["--method", method, *as_options(point), "--epochs", str(args.epochs), *more]
            place = f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            if args.finished and not (args.runs / place / "scores.json").exists():
                continue
            future = trainer.start(place, [*options, "--seed", str(seed)], scored=True)
            found.setdefault(name, []).append(future)
    found = {name: [future.result() for future in futures] for name, futures in found.items()}

    untrained = train.Networks(train.Settings(**found["PSM"][0][0]["settings"])).encoder[0]
    others = {"random encoder": untrained, "raw pixels": nn.Flatten()}
    others = {name: accuracy(module, args.data_dir) for name, module in others.items()}
    about = {
        "seeds": args.seeds,
        "options": [f"--epochs {args.epochs}", *args.rest],
        "machine": machine("cpu"),
        **provenance(),
        "tables": tables(best, found, others),
    }
    for name, table in about["tables"].items():
        print(name, *markdown(*table), sep="\n", end="\n\n")
    args.results.write_text(json.dumps(about, indent=1) + "\n")


def tables(best: dict, found: dict, others: dict) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Heads and rows: the tuning, the accuracy, PSM's settings, purity by epoch."""
    shown = {"knn": "kNN, k = 200", "knn_20": "kNN, k = 20", "linear": "linear probe"}

    def scores(name: str) -> list[str]:
        found_scores = [s for *_, s in found[name]]
        return [
            str(len(found_scores)),
            *(spread([s[k] for s in found_scores], ".2%") for k in shown),
        ]

    def mining(name: str) -> list[str]:
        keys = {"positive_purity": ".1%", "kept": ".1%", "own_copies": ".2f"}
        return [spread([result[k] for result, *_ in found[name]], f) for k, f in keys.items()]

    mined = [name for name in ("PSM", *VARIANTS) if name in found]
    tuned = [
        [name, str(best[m].get("temperature", "-")), str(best[m]["lr"]), f"{best[m]['knn']:.2%}"]
        for name, m in METHODS.items()
    ]
    methods = [[name, *scores(name)] for name in METHODS if name in found]
    methods += [[name, "-", *(f"{s[k]:.2%}" for k in shown)] for name, s in others.items()]
    settings = [[name, *scores(name), *mining(name)] for name in mined]
    epochs = [line["epoch"] for line in found["PSM"][0][1]]

    def at(name: str, epoch: int) -> str:
        return spread([lines[epoch - 1]["positive_purity"] for _, lines, _ in found[name]], ".1%")

    purity = [[name, *(at(name, epoch) for epoch in epochs)] for name in mined]
    columns = ["purity", "negatives kept", "own copies per row"]
    return {
        "tuning": (["", "temperature", "lr", "kNN on held-out images"], tuned),
        "accuracy": (["", "seeds", *shown.values()], methods),
        "settings": (["", "seeds", *shown.values(), *columns], settings),
        "purity": (["", *(f"epoch {e}" for e in epochs)], purity),
    }


if __name__ == "__main__":
    main()
