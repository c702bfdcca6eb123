"""Has anything become slower? Ratios of a few small shapes against benchmarks/guard.json.

    python -m benchmarks.guard             exit 1 on a loss of more than 30 %
    python -m benchmarks.guard --update    write what this machine measures now

A ratio is our time over that of plain torch in the same round, and its median over the rounds. On a
CPU it is processor time of one thread: a busy machine takes away the second core now and then, and
that hurts one more than another. Something of ours has become slower where the ratios to both
baselines are too large, three times in a row; one alone is the baseline or the machine. A bf16 bank
that takes longer than an fp32 one, where it did not, is a loss as well. Another kind of machine has
an entry of its own; without one the guard says so and passes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.cases import Case, make_problem
from benchmarks.machine import chip, machine
from benchmarks.measure import Turns, keep_memory
from benchmarks.providers import PROVIDERS, our_name

STORED = Path(__file__).with_suffix(".json")
LOSS = 1.3
TRIES = 3
SECONDS = 2.0  # of timed rounds for a shape; a try takes ten seconds
CASES = (
    Case("psm", 256, 4_096, 128, 5),
    Case("info_nce", 256, 8_192, 128),
    Case("bank_topk", 256, 32_768, 128, 5),
    Case("psm", 256, 4_096, 128, 5, "bf16"),
    Case("enqueue", 256, 8_192, 128),
)
BASES = ("eager", "matmul")
FP32 = "fp32"  # the base of a bf16 case: ours on an fp32 bank

Ratios = dict[str, dict[str, float]]  # of a case to each base


def kind(device: str) -> str:
    """Machines that are compared with each other."""
    about = machine(device)
    if device != "cpu":
        return about["gpu"]
    return f"{chip()}, {about['instructions']}"


def measure(device: str) -> Ratios:
    found: Ratios = {}
    for case in CASES:
        problem, ours = make_problem(case, device), our_name(device)
        bases = [name for name in BASES if PROVIDERS[name].refuse(case, device) is None]
        runs = {name: PROVIDERS[name].make(problem) for name in (ours, *bases)}
        if case.dtype == "bf16":
            same = make_problem(dataclasses.replace(case, dtype="fp32"), device)
            runs[FP32] = PROVIDERS[ours].make(same)
            bases.append(FP32)
        turns = Turns(runs, device, clock=time.process_time)
        turns()
        turns.measure(SECONDS, most=400)
        for base in bases:
            pairs = zip(turns.taken[ours], turns.taken[base], strict=True)
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
            found.setdefault(str(case), {})[base] = round(ratio, 4)
    return found


def combine(several: list[Ratios], choose) -> Ratios:
    return {
        case: {base: choose([one[case][base] for one in several]) for base in ratios}
        for case, ratios in several[0].items()
    }


def losses(now: Ratios, stored: Ratios) -> list[str]:
    """A line for each case that is slower than stored by more than LOSS against every base, and for
    a bf16 one that has fallen behind fp32."""
    lines = []
    for case, ratios in now.items():
        before = stored.get(case)
        if before is None:
            lines.append(f"{case} is not stored: --update")
            continue
        more = min(ratios[base] / before[base] for base in ratios if base != FP32)
        if more > LOSS:
            lines.append(f"{case} takes {more - 1:.0%} more than stored")
        if ratios.get(FP32, 0) > 1 > before.get(FP32, 1):
            lines.append(f"{case} takes {ratios[FP32]:.2f} times as long as fp32")
    return lines


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write benchmarks/guard.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    keep_memory()
    every = json.loads(STORED.read_text()) if STORED.exists() else {}
    name = kind(args.device)
    if args.update:
        several = [measure(args.device) for _ in range(TRIES)]
        every[name] = combine(several, statistics.median)
        STORED.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n")
        print(f"{STORED.name}: {name}: {every[name]}")
        return 0
    if name not in every:
        print(
            f"SKIPPED: {STORED.name} has no entry for {name!r} (has {', '.join(every)}): --update"
        )
        return 0

    tried: list[Ratios] = []
    for _ in range(TRIES):
        tried.append(measure(args.device))
        now = combine(tried, min)
        found = losses(now, every[name])
        if not found:
            break
    for case, ratios in now.items():
        cells = (f"{value:.3g} of {base} (stored {every[name].get(case, {}).get(base)})"
                 for base, value in ratios.items())  # fmt: skip
        print(f"{case}: ours takes {', '.join(cells)}")
    print("\n".join(f"LOSS {line}" for line in found) or f"no loss above {LOSS - 1:.0%}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
