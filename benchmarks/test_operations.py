"""Time and memory of every operation by every provider. `pytest benchmarks/`

Speed counts only behind agreement: providers that do the same job must return the same value.
"""

from __future__ import annotations

import dataclasses
import gc

import pytest

from benchmarks.cases import make_problem
from benchmarks.conftest import wants_memory
from benchmarks.measure import Turns, available_memory, peak_memory
from benchmarks.providers import PROVIDERS, select

# Of the loss: another provider draws other negatives, metric-learning has the batch's keys besides.
TOLERANCE = 0.03


def test_operation(case, cache, benchmark, results, options):
    if case.bank_bytes > 0.4 * available_memory(options.device):  # the fresh process has its own
        results["skipped"].append([str(case), "all", f"a bank of {case.bank_bytes / 1e9:.1f} GB"])
        pytest.skip(f"twice {case.bank_bytes / 1e9:.1f} GB for the bank do not fit")
    problem = make_problem(case, options.device)
    able, reasons = select(case, options.device)
    for name, reason in reasons.items():
        if [str(case), name, reason] not in results["skipped"]:
            results["skipped"].append([str(case), name, reason])
    runs = {name: PROVIDERS[name].make(problem) for name in able}

    values = {name: run() for name, run in runs.items() if PROVIDERS[name].same_job}
    if case.operation != "enqueue":
        wanted = values["slab" if "slab" in values else "eager"].float().mean().item()
        for name, value in values.items():
            assert value.float().mean().item() == pytest.approx(wanted, rel=TOLERANCE), name
    del values

    # pytest-benchmark times one function after the other. To it a round is one call of each
    # provider, and the clocks are in Turns, so that nobody gets the quiet half of the minute.
    turns = Turns(runs, options.device, cache)
    turns()
    rounds = 1 if options.tiny else turns.rounds(options.budget)
    benchmark.pedantic(turns, rounds=rounds, iterations=1)

    del runs, problem, turns.runs
    gc.collect()
    for name, taken in turns.summary().items():
        row = {**dataclasses.asdict(case), "provider": name, "cache": cache, **taken}
        row["same_job"] = PROVIDERS[name].same_job
        if row["same_job"] and cache == "warm" and wants_memory(case, options):
            row["memory"] = peak_memory(case, name, options.device)
        benchmark.extra_info[name] = taken
        results["rows"].append(row)
