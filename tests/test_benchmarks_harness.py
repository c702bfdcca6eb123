"""The harness of benchmarks/: cases, baselines, clocks, the machine's name, and competitors that
fail in every way."""

import dataclasses
import itertools
import subprocess
import sys
import time
import types

import pytest
import torch

from benchmarks import (
    eager,
    machine,
    measure,
    provider,
    providers,
    slab,
    test_operations,
    test_training_step,
)
from benchmarks.cases import (
    BANKS,
    PRODUCTS,
    SWEEPS,
    Case,
    default_cases,
    make_problem,
    sweep_cases,
    tiny,
)

PSM = Case("psm", 256, 65_536, 128, 5)
OURS = providers.our_name("cpu")


def test_quantiles():
    found = measure.quantiles([float(i) for i in range(1, 12)])
    assert found == {"median": 6.0, "low": 2.0, "high": 10.0, "rounds": 11}
    assert measure.quantiles([2.0])["low"] == 2.0


def test_turns_call_everyone_once_a_round_and_forget_the_warmup():
    calls, ticks = [], itertools.count()
    turns = measure.Turns(
        {n: lambda n=n: calls.append(n) for n in "abc"}, "cpu", clock=lambda: float(next(ticks))
    )
    turns.measure(budget=0.0, least=5)
    assert sorted(calls) == sorted("abc" * 6)
    assert all(found["rounds"] == 5 for found in turns.summary().values())
    turns.measure(budget=2.5, least=0)  # a round takes 3.0: the one that warms up has to do
    assert len(calls) == 3 * 7
    turns.measure(budget=6.0, least=0)
    assert turns.summary()["a"] == {"median": 1.0, "low": 1.0, "high": 1.0, "rounds": 2}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_known_and_small_ones_are_possible(device):
    swept = sweep_cases(SWEEPS)
    for case in default_cases(device) + swept:
        assert case.operation in PRODUCTS
        assert tiny(case).topk <= tiny(case).size
    assert {case.size for case in swept} >= {1 << 12, 1 << 24}
    assert {case.bank for case in swept} == set(BANKS)
    assert len(swept) == len(set(swept))


@pytest.mark.parametrize("kind", BANKS)
def test_banks_are_full_and_unit(kind):
    problem = make_problem(Case("psm", 4, 70, 16, 2, bank=kind), "cpu")
    assert problem.memory.count == 70
    torch.testing.assert_close(problem.bank.norm(dim=1), torch.ones(70))


FORMULAS = ("psm", "info_nce", "hcl", "unremix", "nnclr", "supcon", "ressl", "msf")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("operation", FORMULAS)
def test_lean_lines_are_the_formula(operation, dtype, monkeypatch):
    """Value and gradient. With every negative kept there is no noise between them."""
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    topk = 3 if operation in ("psm", "msf") else 0
    problem = make_problem(Case(operation, 6, 70, 16, topk, dtype), "cpu")
    wanted = {"selection": "all"} if operation == "psm" else {}
    formula = providers.our_loss(problem, "reference", **wanted)
    lean = eager.STEPS[operation](problem)
    gradients = [torch.autograd.grad(loss, problem.query)[0] for loss in (lean, formula)]
    # bf16 products are rounded at other places: queries before or after they are divided by tau.
    close = {"rtol": 0.02, "atol": 2e-3} if dtype == "bf16" else {}
    torch.testing.assert_close(lean, formula, **close)
    torch.testing.assert_close(*gradients, **close)


def test_lean_sscl_is_the_formula_but_for_its_draws():
    problem = make_problem(Case("sscl", 64, 512, 16, 32), "cpu")
    formula = providers.our_loss(problem, "reference")
    torch.testing.assert_close(eager.sscl_step(problem), formula, rtol=0.01, atol=0)


def test_slab_computes_our_loss(monkeypatch):
    """Three slabs. `compile` takes seconds to build: the benchmark itself compares it."""
    monkeypatch.setattr(slab, "SLAB", 4 * 6 * 25)
    monkeypatch.setattr(slab.torch, "compile", lambda call, **options: call)
    slab._weigh.cache_clear()
    problem = make_problem(Case("psm", 6, 70, 16, 3), "cpu")
    rows = []
    for backend in ("reference", slab.Slab()):
        value = providers.our_loss(problem, backend, selection="all")
        rows.append((value, torch.autograd.grad(value, problem.query)[0]))
    torch.testing.assert_close(*rows)
    slab._weigh.cache_clear()


def test_providers_give_reasons(monkeypatch):
    def refuse(name, case=PSM):
        return providers.PROVIDERS[name].refuse(case, "cpu")

    assert refuse("matmul") is None
    assert refuse("faiss") == providers.OTHER_JOB
    assert "UnReMix" in refuse("slab", Case("unremix", 4, 8, 4))
    monkeypatch.setattr(provider, "available_memory", lambda device: 1e6)
    assert refuse("eager").startswith("would take 0.4 GB of 0.0 GB")


def test_long_calls_are_foreseen():
    sizes = {1024: 0.05, 4096: 0.1, 16_384: 0.019}  # the last one is too short to tell

    def row(size, name, low):
        case = dataclasses.asdict(dataclasses.replace(PSM, size=size))
        return {**case, "provider": name, "low": low}

    rows = [row(size, "slab", time) for size, time in sizes.items()]
    rows.append(row(PSM.size, "eager", 1.0))
    assert test_operations.forecast(rows, PSM, "slab") == pytest.approx(0.1 * 16)
    assert test_operations.forecast(rows, PSM, "cpp") == 0.0


# --- competitors that fail -----------------------------------------------------------------------


def after(calls: int, act, who: str = "eager"):
    """A run that does its job `calls` times and then `act`."""

    def make(problem):
        real, left = providers.PROVIDERS[who].make(problem), iter(range(calls))
        return lambda: real() if next(left, None) is not None else act()

    return make


def fail(error):
    def act(*ignored):
        raise error

    return act


def hang():
    while True:
        time.sleep(0.05)


def wrong(problem):
    return lambda: torch.tensor(1e6)


FAILURES = {
    "no such library": (fail(ImportError("No module named 'x'")), "ImportError: No module"),
    "a broken library": (fail(OSError("x.so: undefined symbol")), "OSError: x.so"),
    "it leaves": (fail(SystemExit(3)), "SystemExit: 3"),
    "does not compile": (after(0, fail(RuntimeError("CppCompileError\nlong"))), "CppCompileError"),
    "no memory, no words": (after(0, fail(MemoryError())), "failed: MemoryError"),
    "a later round": (after(3, fail(RuntimeError("out of memory"))), "RuntimeError: out of"),
    "hangs": (after(0, hang), "TimeoutError: took more than 1 s"),
    "hangs in a later round": (after(3, hang), "TimeoutError: took more than 1 s"),
    "takes long": (after(1, lambda: time.sleep(0.4)), "a call takes 0 s: --longest"),
    "disagrees": (wrong, "disagrees: returns 1e+06, not"),
}


@pytest.fixture
def measured(monkeypatch):
    """What test_operation leaves of a small case with ours and one more provider."""
    if OURS == "reference":
        pytest.skip("no backend of ours: its C++ was not built")
    case = Case("info_nce", 4, 70, 16)
    options = types.SimpleNamespace(
        device="cpu", tiny=False, sweep=[], cases=[case], budget=0.0, least=5, longest=0.3,
        patience=1.0, minutes=1, seconds_left=lambda: 60.0,
    )  # fmt: skip
    benchmark = types.SimpleNamespace(
        pedantic=lambda call, args, rounds: call(*args), extra_info={}
    )

    def run(peak=lambda *asked: 1, **others):
        monkeypatch.setattr(test_operations, "peak_memory", peak)
        monkeypatch.setattr(test_operations, "PROVIDERS", {OURS: ours, **others})
        results = {"ours": OURS, "rows": [], "skipped": []}
        test_operations.test_operation(case, "warm", benchmark, results, options)
        return results

    ours = providers.PROVIDERS[OURS]
    return run


@pytest.mark.parametrize("how", FAILURES)
def test_whatever_a_competitor_does_is_a_skip_with_its_reason(how, measured):
    make, reason = FAILURES[how]
    results = measured(fake=provider.Provider(how, lambda case, device: None, make))
    assert [row["provider"] for row in results["rows"]] == [OURS]
    ((_, name, said),) = results["skipped"]
    assert name == "fake"
    assert reason in said
    assert "\n" not in said


def test_a_competitor_that_cannot_even_refuse_is_a_skip(measured):
    broken = provider.Provider("", fail(ValueError("x.__spec__ is None")), wrong)
    results = measured(fake=broken)
    assert results["skipped"][0][2] == "failed: ValueError: x.__spec__ is None"


@pytest.mark.parametrize("calls", [0, 3])
def test_what_fails_of_ours_is_a_failure(calls, measured):
    make = after(calls, fail(RuntimeError("a kernel")), OURS)
    with pytest.raises(RuntimeError, match="a kernel"):
        measured(**{OURS: provider.Provider("", lambda case, device: None, make)})


def test_ours_disagreeing_with_the_formula_is_a_failure(measured):
    ours = provider.Provider("", lambda case, device: None, wrong)
    with pytest.raises(AssertionError, match="differs from the formula"):
        measured(**{OURS: ours})


def test_memory_that_cannot_be_measured_is_a_failure_of_ours(measured):
    assert measured()["rows"][0]["memory"] == 1
    with pytest.raises(RuntimeError, match="was killed"):
        measured(peak=fail(RuntimeError("was killed")))


def test_memory_in_a_process_that_fails_or_hangs_is_an_error():
    case = Case("psm", 4, 70, 16, 2)
    with pytest.raises(RuntimeError, match="KeyError: 'nobody', when its memory was measured"):
        measure.peak_memory(case, "nobody", "cpu")
    with pytest.raises(RuntimeError, match="took more than 0 s"):
        measure.peak_memory(case, "eager", "cpu", patience=0.0)


def test_training_step_says_what_is_missing(monkeypatch):
    assert test_training_step.missing() is None

    def broken(module):
        if module == "torchvision":
            raise OSError("undefined symbol")

    monkeypatch.setattr(test_training_step.importlib, "import_module", broken)
    assert test_training_step.missing() == (
        "train.py needs torchvision: pip install -e '.[bench]' (OSError: undefined symbol)"
    )


# --- names of machines ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vendor", "family", "model", "words", "wanted"),
    [
        ("AuthenticAMD", 25, 17, "AMD EPYC", "amd-epyc-zen4"),
        ("AuthenticAMD", 25, 1, "AMD EPYC 7763 64-Core Processor", "amd-epyc-zen3"),
        ("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Processor", "intel-xeon-sapphire-rapids"),
        ("GenuineIntel", 6, 1, "", "intel-family-6-model-1"),
    ],
)  # fmt: skip
def test_chip(vendor, family, model, words, wanted, monkeypatch):
    fields = {"vendor_id": vendor, "cpu family": family, "model": model, "model name": words}
    monkeypatch.setattr(machine, "_cpu_fields", lambda: fields)
    assert machine.chip() == wanted
    assert machine.name("cpu").startswith(f"{wanted}-")
    assert machine.name("cpu").endswith("-cores")


def test_only_whole_runs_are_stored():
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--store", "-k", "enqueue"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT)
    assert done.returncode == 4
    assert "--store: wanted a whole run" in done.stdout + done.stderr
