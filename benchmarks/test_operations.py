"""Time and memory of every operation by every provider. `pytest benchmarks/`

Speed counts only behind agreement: providers that do the same job must return the same value.
"""

from __future__ import annotations

import dataclasses
import gc
from concurrent.futures.process import BrokenProcessPool

import pytest

from benchmarks.cases import Case, make_problem, sweep_cases
from benchmarks.measure import Turns, available_memory, peak_memory
from benchmarks.providers import OTHER_JOB, PROVIDERS
from psm_kernels.backends import registry

# Of the loss: another provider draws other negatives, metric-learning has the batch's keys besides.
TOLERANCE = 0.03
OVER_K = frozenset(sweep_cases(["K"]))


def test_operation(case, cache, benchmark, results, options):
    reason = refuse_case(case, results, options)
    if reason:
        results["skipped"].append([str(case), "all", reason])
        pytest.skip(reason)
    reasons = {name: refuse(case, name, results, options) for name in PROVIDERS}
    problem = make_problem(case, options.device)
    runs, values = {}, {}
    for name in [name for name, reason in reasons.items() if reason is None]:
        try:
            runs[name] = PROVIDERS[name].make(problem)
            values[name] = runs[name]()
        except Exception as error:  # of a competitor, as where Inductor's C++ does not compile
            if name in registry.TABLE:
                raise
            runs.pop(name, None)
            reasons[name] = f"failed: {str(error).strip().splitlines()[0][:200]}"
    able = list(runs)
    note(results, case, reasons)
    check_agreement(case, {name: x for name, x in values.items() if PROVIDERS[name].same_job})

    # pytest-benchmark times one function after the other. To it all rounds are one call, and the
    # clocks are in Turns, so that nobody gets the quiet half of the minute.
    turns = Turns(runs, options.device, cache)
    benchmark.pedantic(turns.measure, args=(options.budget, options.least), rounds=1)
    taken = turns.summary()
    benchmark.extra_info.update(taken)
    del problem, runs, turns
    gc.collect()
    for name in able:
        row = {**dataclasses.asdict(case), "provider": name, "cache": cache, **taken[name]}
        row["same_job"] = PROVIDERS[name].same_job
        if row["same_job"] and cache == "warm" and wants_memory(case, options):
            try:
                row["memory"] = peak_memory(case, name, options.device)
            except BrokenProcessPool:
                note(results, case, {name: "was killed when its memory was measured"})
        results["rows"].append(row)


def check_agreement(case: Case, values: dict) -> None:
    if case.operation == "enqueue":
        return
    wanted = values["slab" if "slab" in values else next(iter(values))].float().mean().item()
    for name, value in values.items():
        assert value.float().mean().item() == pytest.approx(wanted, rel=TOLERANCE), name


# --- what sits out -------------------------------------------------------------------------------


def refuse_case(case: Case, results: dict, options) -> str | None:
    if case.bank_bytes > 0.8 * available_memory(options.device):
        return f"the bank's {case.bank_bytes / 1e9:.1f} GB do not fit"
    if 2 * forecast(results["rows"], case, results["ours"]) >= options.seconds_left():
        return f"it would not be done within {options.minutes:g} minutes: --minutes"
    return None


def refuse(case: Case, name: str, results: dict, options) -> str | None:
    reason = PROVIDERS[name].refuse(case, options.device)
    if reason or name == results["ours"]:
        return reason
    if name == "compile" and options.sweep and case not in OVER_K:
        return "takes ten seconds to compile each shape: in sweeps over K alone"
    expected = forecast(results["rows"], case, name)
    if expected > options.longest:
        return f"a call would take more than {options.longest:.0f} s: --longest"
    return None


def forecast(rows: list[dict], case: Case, provider: str) -> float:
    """Seconds of a call at least, from those of its kind that were measured: time grows with B K D.
    Short ones tell of other costs, and the median of a busy machine."""
    kind = (provider, case.operation, case.dtype)
    rates = (
        row["low"] / (row["batch"] * row["size"] * row["dim"])
        for row in rows
        if (row["provider"], row["operation"], row["dtype"]) == kind and row["low"] > 0.02
    )
    return case.elements * min(rates, default=0.0)


def note(results: dict, case: Case, reasons: dict[str, str | None]) -> None:
    """Once for each cache."""
    for name, reason in reasons.items():
        line = [str(case), name, reason]
        if reason not in (None, OTHER_JOB) and line not in results["skipped"]:
            results["skipped"].append(line)


def wants_memory(case: Case, options) -> bool:
    """The largest fp32 bank of each operation; in a sweep PSM's over K."""
    if options.sweep:
        return case.operation == "psm" and case in OVER_K
    same = [c for c in options.cases if (c.operation, c.dtype) == (case.operation, "fp32")]
    largest = max(same, key=lambda c: (c.size, c.batch), default=None)
    return case == largest and case.operation not in ("psm_forward", "enqueue")
