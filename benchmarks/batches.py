"""Losses within the batch, forward and backward, against the matrix:

    python -m benchmarks.batches --store       256 to 8,192 pairs; ten minutes, 2 GB
    python -m benchmarks.batches --batches 64 --dims 16 --budget 0     does it run?

Who takes part gets rows of unit length, both sides of which want a gradient. Rounds are taken in
turns; times are medians. Memory is the peak on top of the inputs, each in a fresh process.
--store keeps the tables in benchmarks/results/batches.json, for benchmarks.report.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import machine, provenance
from benchmarks.measure import Turns, first_line, keep_memory, peak_from_here
from benchmarks.report import STORED
from benchmarks.tables import markdown, megabytes, ratio
from psm_kernels.functional import clip_loss, info_nce_loss

Loss = Callable[[Tensor, Tensor], Tensor]
TEMPERATURE = 0.1


# --- who does it ---------------------------------------------------------------------------------


def views_by_eager(query: Tensor, key: Tensor) -> Tensor:
    """SimCLR's loss as one writes it: a matrix whose diagonal is masked, and cross entropy."""
    rows = torch.cat((query, key))
    logits = rows @ rows.T / TEMPERATURE
    logits.fill_diagonal_(-torch.inf)
    target = torch.arange(len(rows)).roll(len(query))
    return F.cross_entropy(logits, target)


def views_by_lightly() -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(TEMPERATURE)


def towers_by_eager(query: Tensor, key: Tensor) -> Tensor:
    """CLIP's loss with one matrix and its transpose; OpenCLIP multiplies twice."""
    logits = query @ key.T / TEMPERATURE
    target = torch.arange(len(query))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def towers_by_openclip() -> Loss:
    from open_clip.loss import ClipLoss

    return functools.partial(ClipLoss(), logit_scale=1 / TEMPERATURE)


METHODS: dict[str, dict[str, Callable[[], Loss]]] = {
    "info_nce": {
        "ours": lambda: functools.partial(info_nce_loss, temperature=TEMPERATURE),
        "passes": lambda: functools.partial(info_nce_loss, temperature=TEMPERATURE, backend="cpp"),
        "eager": lambda: views_by_eager,
        "compile": lambda: torch.compile(views_by_eager, dynamic=False),
        "lightly": views_by_lightly,
    },
    "clip": {
        "ours": lambda: functools.partial(clip_loss, logit_scale=1 / TEMPERATURE),
        "passes": lambda: functools.partial(clip_loss, logit_scale=1 / TEMPERATURE, backend="cpp"),
        "eager": lambda: towers_by_eager,
        "compile": lambda: torch.compile(towers_by_eager, dynamic=False),
        "open_clip": towers_by_openclip,
    },
}


def make(method: str, provider: str, batch: int, dim: int) -> Callable[[], Tensor]:
    """A call of forward and backward."""
    loss = METHODS[method][provider]()
    draw = torch.Generator().manual_seed(0)
    query, key = (F.normalize(torch.randn(batch, dim, generator=draw)) for _ in range(2))
    query.requires_grad_(), key.requires_grad_()

    def run() -> Tensor:
        query.grad = key.grad = None
        value = loss(query, key)
        value.backward()
        return value.detach()

    return run


# --- a case --------------------------------------------------------------------------------------


def peak(method: str, provider: str, batch: int, dim: int) -> int | None:
    """Bytes, measured in a fresh process; None where it fails there."""
    line = [sys.executable, "-m", "benchmarks.batches", "--worker", method, provider]
    line += [str(batch), str(dim)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def worker(method: str, provider: str, batch: str, dim: str) -> None:
    run = make(method, provider, int(batch), int(dim))
    make(method, provider, 64, int(dim))()  # loads what is loaded at the first call
    risen = peak_from_here()
    run()
    print(risen())


def measure(
    method: str, batch: int, dim: int, budget: float
) -> tuple[dict[str, float], dict[str, str]]:
    """(seconds by provider, why the others are not there)."""
    torch.compiler.reset()  # or it stops compiling at the ninth size
    runs, failed, values = {}, {}, {}
    for provider in METHODS[method]:
        try:
            run = make(method, provider, batch, dim)
            values[provider] = run()
            runs[provider] = run
        except Exception as error:  # a peer that is not installed, or a case it cannot do
            failed[provider] = first_line(error)
    for provider, value in values.items():
        torch.testing.assert_close(value, values["ours"], rtol=1e-4, atol=1e-5, msg=provider)
    turns = Turns(runs, "cpu")
    turns.measure(budget, least=3)
    return {name: row["median"] for name, row in turns.summary().items()}, failed


def table(
    method: str, batches: list[int], dims: list[int], budget: float
) -> tuple[list[str], list[list[str]], dict[str, str]]:
    others = [name for name in METHODS[method] if name != "ours"]
    head = ["B x D", "ours, ms", *others, "memory, ours / eager"]
    body, left_out = [], {}
    for dim in dims:
        for batch in batches:
            found, failed = measure(method, batch, dim, budget)
            left_out |= failed
            cells = [f"{batch:,} x {dim}", f"{1e3 * found['ours']:.1f}"]
            cells += [ratio(found.get(name), found["ours"]) for name in others]
            sizes = [peak(method, name, batch, dim) for name in ("ours", "eager")]
            cells.append(" / ".join("" if size is None else megabytes(size) for size in sizes))
            body.append(cells)
            print(method, *cells, file=sys.stderr, flush=True)
    return head, body, left_out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 512])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for a case's rounds")
    parser.add_argument("--store", action="store_true", help="keep it in benchmarks/results")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_memory()
    if options.worker:
        return worker(*options.worker)
    tables, left_out = {}, {}
    for method in options.methods:
        head, body, failed = table(method, options.batches, options.dims, options.budget)
        tables[method], left_out[method] = [head, body], failed
        print(f"{method}\n" + "\n".join(markdown(head, body)))
        for provider, why in failed.items():
            print(f"{provider} is left out: {why}")
    if options.store:
        kept = {"left_out": left_out, "tables": tables}
        kept |= {"machine": machine("cpu")} | provenance()
        (STORED / "batches.json").write_text(f"{json.dumps(kept, indent=1)}\n")


if __name__ == "__main__":
    main()
