"""The three experiments of PSM's note, and every method, on digits, with several seeds each:

    python -m benchmarks.digits_experiments --jobs 2

Trains each configuration with each seed by train.py and prints markdown tables of mean and
standard deviation over the seeds, read from the files the runs leave; benchmarks.report puts them
into the README from benchmarks/results/digits.json. Runs that are there already are not repeated,
and an interrupted one is continued.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine import provenance
from benchmarks.report import STORED
from benchmarks.tables import markdown

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
CONFIGURATIONS = {
    "PSM": [],
    "uniform soft weights": ["--soft-weights", "uniform"],
    "PNSM off": ["--selection", "all"],
    "InfoNCE": ["--method", "infonce"],
    "HCL": ["--method", "hcl"],
    "SSCL": ["--method", "sscl"],
    "UnReMix": ["--method", "unremix"],
}


def run(folder: Path, name: str, options: list[str], threads: int) -> tuple[dict, list[dict]]:
    """result.json and the lines of metrics.jsonl of a run, trained first where it is missing."""
    place = folder / name
    if not (place / "result.json").exists():
        resumed = ["--resume"] if (place / "checkpoint.pt").exists() else []
        command = [sys.executable, TRAIN, "--runs", folder, "--name", name, *options, *resumed]
        print(f"{name}: {' '.join(options)}", file=sys.stderr)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=environment
        )
    lines = (place / "metrics.jsonl").read_text().splitlines()
    return json.loads((place / "result.json").read_text()), [json.loads(line) for line in lines]


def spread(values: list[float | None], form: str) -> str:
    if None in values:
        return "-"
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="default: train.py's")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, help="PSM and these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_experiments"))
    parser.add_argument("--results", type=Path, default=STORED / "digits.json")
    parser.add_argument("rest", nargs="*", help="after --: more options for train.py")
    args = parser.parse_args()
    common = [*(["--epochs", str(args.epochs)] if args.epochs else []), *args.rest]

    threads = max(1, os.cpu_count() // args.jobs)
    found = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in args.seeds:  # seed by seed: an early look compares all configurations
            for name, options in CONFIGURATIONS.items():
                if args.only and name not in ("PSM", *args.only):
                    continue
                place = f"{name.replace(' ', '-')}-{seed}"
                options = ["--seed", str(seed), *options, *common]
                pair = pool.submit(run, args.runs, place, options, threads)
                found.setdefault(name, []).append(pair)
    found = {name: [pair.result() for pair in pairs] for name, pairs in found.items()}

    def row(name, *values):  # (form, function of a run's result)
        results = [result for result, _ in found[name]]
        return [name, *(spread([value(r) for r in results], form) for form, value in values)]

    trained, untrained = "trained encoder", "random-initialized encoder"
    accuracy = [
        (".2%", lambda r, k=k: r["accuracy"][trained][k]) for k in ("knn", "linear", "linear_10")
    ]
    tables = {}
    rows = [
        row(
            name,
            *accuracy,
            (".1%", lambda r: r.get("positive_purity")),
            (".1%", lambda r: r.get("kept")),
        )
        for name in found
    ]
    for name in (untrained, "raw pixels"):
        scores = [result["accuracy"][name] for result, _ in found["PSM"]]
        columns = [spread([s[k] for s in scores], ".2%") for k in ("knn", "linear", "linear_10")]
        rows.append([name, *columns, "-", "-"])
    head = ["", "kNN", "linear", "linear, 10 labels per class", "purity", "negatives kept"]
    tables["accuracy"] = head, rows

    epochs = [row["epoch"] for row in found["PSM"][0][1]]
    shown = sorted({epochs[(len(epochs) - 1) * i // 5] for i in range(6)})
    mining = [name for name in found if found[name][0][0]["settings"]["method"] == "psm"]
    rows = [
        [
            name,
            *(spread([h[e - 1]["positive_purity"] for _, h in found[name]], ".1%") for e in shown),
        ]
        for name in mining
    ]
    tables["purity"] = ["", *(f"epoch {e}" for e in shown)], rows

    rows = []
    for name in mining:
        columns = [
            (".2e", lambda r, s=stat, i=ranks: statistics.mean(r["gradient"][s][i]))
            for ranks in (slice(0, 10), slice(90, 100))
            for stat in ("mean", "var")
        ]
        rows.append(row(name, *columns, (".1f", lambda r: r["gradient"]["positive_rank"])))
    head = ["mean at ranks 1-10", "variance", "mean at ranks 91-100", "variance"]
    tables["gradient"] = ["", *head, "mean rank of the positive"], rows

    for name, (head, rows) in tables.items():
        print(name, *markdown(head, rows), sep="\n", end="\n\n")
    about = {"seeds": args.seeds, "options": common, **provenance(), "tables": tables}
    args.results.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
