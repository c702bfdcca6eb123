"""Has anything become slower? Ratios of three small shapes against benchmarks/guard.json.

    python -m benchmarks.guard             exit 1 on a loss of more than 30 %
    python -m benchmarks.guard --update    write what this machine measures now

A ratio is our time over that of plain torch in the same rounds, so a slow machine does not matter,
and another kind of machine has an entry of its own. Where a ratio is too large, all are measured
once more and the better of the two counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.cases import Case, make_problem
from benchmarks.measure import Turns
from benchmarks.providers import PROVIDERS, our_name

STORED = Path(__file__).with_suffix(".json")
LOSS = 1.3
SECONDS = 2.5  # of timed rounds for a shape; with everything else far below 30 s
CASES = (
    Case("psm", 256, 4_096, 128, 5),
    Case("info_nce", 256, 8_192, 128),
    Case("bank_topk", 256, 8_192, 128, 5),
)
BASES = ("eager", "matmul")

Ratios = dict[str, dict[str, float]]


def kind(device: str) -> str:
    """Machines that are compared with each other."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    from psm_kernels.ops import cpp

    instructions = cpp.instruction_set() if cpp.unavailable() is None else "no C++ backend"
    return f"cpu, {instructions}, {torch.get_num_threads()} threads"


def measure(device: str) -> Ratios:
    """Our time over eager's and over one product's."""
    found: Ratios = {}
    for case in CASES:
        problem, ours = make_problem(case, device), our_name(device)
        turns = Turns({name: PROVIDERS[name].make(problem) for name in (ours, *BASES)}, device)
        turns()
        turns()
        for _ in range(turns.rounds(SECONDS, least=5, most=40)):
            turns()
        median = {name: taken["median"] for name, taken in turns.summary().items()}
        found[str(case)] = {base: round(median[ours] / median[base], 4) for base in BASES}
    return found


def losses(now: Ratios, stored: Ratios) -> list[str]:
    """A line for each ratio that is more than LOSS times the stored one, or that is not stored."""
    lines = []
    for case, ratios in now.items():
        for base, value in ratios.items():
            before = stored.get(case, {}).get(base)
            if before is None:
                lines.append(f"{case}: ours / {base} is not stored: --update")
            elif value > LOSS * before:
                lines.append(
                    f"{case}: ours / {base} was {before:.3g} and is {value:.3g}, "
                    f"{value / before - 1:.0%} more"
                )
    return lines


def better(first: Ratios, second: Ratios) -> Ratios:
    """The smaller of each ratio."""
    return {
        case: {base: min(value, second[case][base]) for base, value in ratios.items()}
        for case, ratios in first.items()
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write benchmarks/guard.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(words)
    every = json.loads(STORED.read_text()) if STORED.exists() else {}
    name = kind(args.device)
    if args.update:
        every[name] = measure(args.device)
        STORED.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n")
        print(f"{STORED.name}: {name}: {every[name]}")
        return 0
    if name not in every:  # to pass here would be to guard nothing
        print(f"{STORED.name} has no entry for {name!r}: python -m benchmarks.guard --update")
        return 1

    now = measure(args.device)
    found = losses(now, every[name])
    if found:
        now = better(now, measure(args.device))
        found = losses(now, every[name])
    for case, ratios in now.items():
        cells = (f"{base} {value:.3g} (stored {every[name][case][base]:.3g})"
                 for base, value in ratios.items() if case in every[name])  # fmt: skip
        print(f"{case}: ours over {', '.join(cells)}")
    print("\n".join(f"LOSS {line}" for line in found) or f"no loss above {LOSS - 1:.0%}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
