"""Time and memory of every operation by every provider. `pytest benchmarks/`

Speed counts only behind agreement: providers that do the same job must return the same value. What
fails of ours fails the test; whatever a competitor does is a line in what was skipped.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from benchmarks.cases import Case, Problem, make_problem, sweep_cases
from benchmarks.measure import (
    Turns,
    available_memory,
    first_line,
    give_back_memory,
    peak_memory,
    seconds,
    time_limit,
)
from benchmarks.provider import OTHER_JOB, refuse_matrices
from benchmarks.providers import PROVIDERS, make_on
from psm_kernels.backends import registry

# Of the loss: another provider draws other negatives, metric-learning has the batch's keys besides.
TOLERANCE = 0.03
OUR_TOLERANCE = 1e-3  # to the formula, whose draws are the same
OVER_K = frozenset(sweep_cases(["K"]))


def test_operation(case, cache, benchmark, results, options):
    reason = refuse_case(case, results, options)
    if reason:
        results["skipped"].append([str(case), "all", reason])
        pytest.skip(reason)
    if not options.tiny:
        torch._dynamo.reset()  # after eight shapes of a function it would run plain torch instead
    problem = make_problem(case, options.device)
    runs, values = start(problem, results, options)
    wanted = formula(problem)
    for name, reason in disagreements(case, values, wanted).items():
        note(results, case, name, reason)
        del runs[name]

    # pytest-benchmark times one function after the other. To it all rounds are one call, and the
    # clocks are in Turns, so that nobody gets the quiet half of the minute.
    attempt_within = functools.partial(attempt, patience=options.patience)
    turns = Turns(runs, options.device, cache, attempt=attempt_within)
    benchmark.pedantic(turns.measure, args=(options.budget, options.least), rounds=1)
    for name, reason in turns.failed.items():
        note(results, case, name, reason)
    taken = turns.summary()
    benchmark.extra_info.update(taken)
    del problem, runs, turns, values
    give_back_memory()
    for name, times in taken.items():
        row = {**dataclasses.asdict(case), "provider": name, "cache": cache, **times}
        row["same_job"] = PROVIDERS[name].same_job
        if row["same_job"] and cache == "warm" and wants_memory(case, name, results, options):
            measure = functools.partial(peak_memory, case, name, options.device, options.patience)
            row["memory"], reason = attempt(name, measure, 2 * options.patience)
            note(results, case, name, reason)
        results["rows"].append(row)


def attempt(name: str, call, patience: float):
    """(what `call` returns, None); of a competitor that fails or hangs (None, why)."""
    if name in registry.TABLE:
        return call(), None
    try:
        with time_limit(patience):
            return call(), None
    except (Exception, SystemExit) as error:
        return None, f"failed: {first_line(error)}"


def start(problem: Problem, results: dict, options) -> tuple[dict, dict]:
    """Who takes part: run and value of each. The first call loads and compiles."""
    runs, values = {}, {}
    for name in PROVIDERS:
        decide = functools.partial(refuse, problem.case, name, results, options)
        refused, failed = attempt(name, decide, options.patience)
        reason = refused or failed
        if reason is None:
            first = functools.partial(first_call, problem, name, results, options)
            found, reason = attempt(name, first, options.patience)
        if reason is None:
            runs[name], values[name], reason = found
        if reason is None:
            continue
        runs.pop(name, None)
        values.pop(name, None)
        note(results, problem.case, name, reason)
    return runs, values


def first_call(problem: Problem, name: str, results: dict, options):
    run = PROVIDERS[name].make(problem)
    value, reason = run(), None
    if name not in registry.TABLE:
        taken = seconds(run, options.device)
        if taken > options.longest:
            reason = f"a call takes {taken:.0f} s: --longest"
    return run, value, reason


# --- agreement -----------------------------------------------------------------------------------


def formula(problem: Problem) -> float | None:
    """By the B x K matrices of `reference`, which has our draws; None where it takes too long."""
    case, device = problem.case, problem.bank.device.type
    large = case.batch * case.size > 1 << 26
    if case.operation == "enqueue" or large or refuse_matrices(case, device):
        return None
    return mean(make_on(problem, "reference")())


def mean(value) -> float:
    return value.float().mean().item()


def disagreements(case: Case, values: dict, wanted: float | None) -> dict[str, str]:
    """Which competitors return another value than the formula; without it, than the slab or ours.

    Raises:
        AssertionError: ours does.
    """
    if case.operation == "enqueue":
        return {}
    found = {name: mean(x) for name, x in values.items() if PROVIDERS[name].same_job}
    ours = {name: value for name, value in found.items() if name in registry.TABLE}
    tolerance = OUR_TOLERANCE
    if wanted is None:
        wanted, tolerance = found.get("slab", next(iter(ours.values()))), TOLERANCE
    for name, value in ours.items():
        assert value == pytest.approx(wanted, rel=tolerance), f"{name} differs from the formula"
    return {
        name: f"disagrees: returns {value:.6g}, not {wanted:.6g}"
        for name, value in found.items()
        if name not in ours and value != pytest.approx(wanted, rel=TOLERANCE)
    }


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
    if name == "compile" and options.tiny and (case.operation, case.dtype) != ("psm", "fp32"):
        return "takes ten seconds to compile each shape: of tiny ones PSM's alone"
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


def note(results: dict, case: Case, name: str, reason: str | None) -> None:
    """Once for each cache."""
    line = [str(case), name, reason]
    if reason not in (None, OTHER_JOB) and line not in results["skipped"]:
        results["skipped"].append(line)


def wants_memory(case: Case, name: str, results: dict, options) -> bool:
    """The largest fp32 bank of each operation; in a sweep PSM's over K. Of tiny runs one."""
    if options.tiny:
        return case.operation == "psm" and case.dtype == "fp32" and name == results["ours"]
    if options.sweep:
        return case.operation == "psm" and case in OVER_K
    same = [c for c in options.cases if (c.operation, c.dtype) == (case.operation, "fp32")]
    largest = max(same, key=lambda c: (c.size, c.batch), default=None)
    return case == largest and case.operation not in ("psm_forward", "enqueue")
