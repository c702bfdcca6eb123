"""The logic of benchmarks/ that needs no clock: tables, README markers, the guard's comparison."""

import copy
import dataclasses
import json

import pytest
import torch

from benchmarks import eager, guard, measure, providers, report, slab
from benchmarks.cases import PRODUCTS, Case, default_cases, make_problem, sweep_cases, tiny
from psm_kernels.functional import psm

PSM = Case("psm", 256, 65_536, 128, 5)
TOPK = Case("bank_topk", 256, 65_536, 128, 5)


def row(case: Case, provider: str, median: float, memory: int | None = None, same_job=True):
    numbers = {"median": median, "low": median, "high": median, "rounds": 5}
    rest = {"provider": provider, "cache": "warm", "same_job": same_job, "memory": memory}
    return {**dataclasses.asdict(case), **numbers, **rest}


@pytest.fixture
def results() -> dict:
    about = {"device": "cpu", "cpu": "A CPU", "cores": 2, "threads": 2, "memory_gb": 8}
    losses = [
        {"size": 16_384, "provider": "cpp", "skipped": None, "median": 0.5, "rounds": 3},
        {"size": 16_384, "provider": "eager", "skipped": "would take 14 GB of 8 GB"},
    ]
    return {
        "machine": {**about, "instructions": "avx512"},
        "ours": "cpp",
        "date": "2026-01-02",
        "commit": "abc",
        "changed": False,
        "versions": {"torch": "2.15.0"},
        "rates": {"fp32": 100e9, "copy": 10e9},
        "rows": [
            row(PSM, "cpp", 0.129, 30_000_000),
            row(PSM, "eager", 1.29, 600_000_000),
            row(PSM, "matmul", 0.04, same_job=False),
            row(TOPK, "cpp", 0.050),
            row(TOPK, "eager", 0.051),
            row(TOPK, "faiss", 0.040),
        ],
        "skipped": [[str(PSM), "liger", "runs on cuda alone"], [str(TOPK), "liger", "other"]],
        "training": {
            "batch": 256,
            "edge": 32,
            "encoders": {"median": 9.5, "rounds": 3},
            "losses": losses,
        },
    }


def test_case_costs():
    assert PSM.flops == 3 * 2 * 256 * 65_536 * 128
    assert PSM.traffic == 65_536 * 128 * 4
    assert dataclasses.replace(PSM, dtype="bf16").traffic == 65_536 * 128 * 2


def test_share_of_the_roofline_is_of_the_slower_of_products_and_traffic():
    products = PSM.flops / 100e9
    assert report.share(PSM, 2 * products, {"fp32": 100e9, "copy": 1e15}) == "50%"
    traffic = PSM.traffic / 1e6
    assert report.share(PSM, 4 * traffic, {"fp32": 1e15, "copy": 1e6}) == "25%"


def test_table_has_ours_in_milliseconds_and_others_as_ratios(results):
    head, _, first, second = report.table(results)
    assert "ours (`cpp`), ms" in head
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[:7] == ["`psm`", "256", "65,536", "128", "5", "fp32", "129"]
    assert cells[7:] == ["10x", "", "", "", "30 MB", "600 MB", "100%"]
    assert "faiss 0.80x" in second
    assert all(line.count("|") == head.count("|") for line in (first, second))


def test_wins_and_ties_are_said(results):
    lines = report.not_fastest(results)
    assert lines == [
        f"eager ties {TOPK} (warm): 1.02x our time",
        f"faiss wins {TOPK} (warm): 1.25x faster than ours",
    ]
    results["rows"] = results["rows"][:3]  # the product is faster and is no competitor
    assert report.not_fastest(results) == ["No competitor wins or ties in what was measured."]


def test_text_sorts_by_time_and_says_what_was_skipped(results):
    text = "\n".join(report.text(results))
    assert text.index("faiss") < text.index("* cpp                     50")
    assert "liger: runs on cuda alone (psm-B256" in text
    assert "(matmul)" in text
    assert "5.0% of the step" in text
    assert "bank 16,384, eager: skipped, would take 14 GB" in text


def test_readme_is_filled_checked_and_stable(results, tmp_path, capsys):
    stored, readme = tmp_path / "machine.json", tmp_path / "README.md"
    stored.write_text(json.dumps(results))
    outside = ("# Title\n\n", "\n\n## After\n")
    readme.write_text("<!-- benchmark:cpu -->\nold\n<!-- /benchmark:cpu -->".join(outside))
    command = [str(stored), "--no-pictures"]
    assert report.main([*command, "--check", str(readme)]) == 1
    assert "differs" in capsys.readouterr().out
    assert report.main([*command, "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(outside[0])
    assert text.endswith(outside[1])
    assert "old" not in text
    assert "\n".join(report.table(results)) in text
    assert report.main([*command, "--check", str(readme)]) == 0
    readme.write_text(text.replace("| 129 |", "| 1 |"))  # a figure typed by hand
    assert report.main([*command, "--check", str(readme)]) == 1


def test_readme_without_markers_or_results_is_refused(results):
    with pytest.raises(ValueError, match="no markers"):
        report.fill("# Title", [results])
    with pytest.raises(ValueError, match="no results for it"):
        report.fill("<!-- benchmark:cuda -->\n<!-- /benchmark:cuda -->", [results])


def test_pictures(results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.pictures import draw

    small = copy.deepcopy(results["rows"])
    for one in small:
        one["size"] //= 4
    names = {path.name for path in draw(results, tmp_path / "m.json")}
    assert names == {"m-ratios.png", "m-ratios.svg"}  # one size: nothing to draw against K
    results["rows"] += small
    names = {path.name for path in draw(results, tmp_path / "m.json")}
    assert names == {f"m-{n}.{e}" for n in ("time", "memory", "ratios") for e in ("png", "svg")}


# --- the guard -----------------------------------------------------------------------------------

STORED = {"a": {"eager": 0.1, "matmul": 3.0}}


def test_guard_allows_30_percent():
    assert guard.losses({"a": {"eager": 0.129, "matmul": 1.0}}, STORED) == []
    (line,) = guard.losses({"a": {"eager": 0.131, "matmul": 3.0}}, STORED)
    assert line == "a: ours / eager was 0.1 and is 0.131, 31% more"
    assert len(guard.losses({"b": {"eager": 0.1}}, STORED)) == 1  # a new shape is not a pass


@pytest.fixture
def guarded(monkeypatch, tmp_path):
    """Runs the guard on measured values that are given."""
    monkeypatch.setattr(guard, "STORED", tmp_path / "guard.json")
    monkeypatch.setattr(guard, "kind", lambda device: "here")

    def run(*measured, words=()):
        values = iter(measured)
        monkeypatch.setattr(guard, "measure", lambda device: next(values))
        return guard.main(list(words))

    return run


def test_guard_measures_again_before_it_fails(guarded):
    good, bad = STORED, {"a": {"eager": 0.2, "matmul": 3.0}}
    assert guarded() == 1  # nothing stored for this machine
    assert guarded(good, words=["--update"]) == 0
    assert guarded(good) == 0
    assert guarded(bad, good) == 0
    assert guarded(bad, bad) == 1


# --- the harness ---------------------------------------------------------------------------------


def test_quantiles():
    found = measure.quantiles([float(i) for i in range(1, 12)])
    assert found == {"median": 6.0, "low": 2.0, "high": 10.0, "rounds": 11}
    assert measure.quantiles([2.0])["low"] == 2.0


def test_turns_call_everyone_once_a_round_and_forget_the_warmup():
    calls = []
    turns = measure.Turns({n: lambda n=n: calls.append(n) for n in "abc"}, "cpu")
    turns()
    assert sorted(calls) == ["a", "b", "c"]
    assert turns.rounds(budget=0.0, least=5) == 5
    turns()
    assert turns.rounds(budget=0.0, least=0) == 0  # the warm-up has to do
    assert all(found["rounds"] == 1 for found in turns.summary().values())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_known_and_small_ones_are_possible(device):
    swept = [case for name in ("K", "B", "D", "k", "bank") for case in sweep_cases(name)]
    for case in default_cases(device) + swept:
        assert case.operation in PRODUCTS
        assert tiny(case).topk <= tiny(case).size
    assert {case.size for case in swept} >= {1 << 12, 1 << 24}


@pytest.mark.parametrize("kind", ["random", "clustered", "sorted", "duplicated"])
def test_banks_are_full_and_unit(kind):
    problem = make_problem(Case("psm", 4, 70, 16, 2, bank=kind), "cpu")
    assert problem.memory.count == 70
    torch.testing.assert_close(problem.bank.norm(dim=1), torch.ones(70))


def test_baseline_and_slab_compute_our_loss(monkeypatch):
    """With every negative kept there is no noise between them; three slabs. `compile` is eager's
    code and takes seconds to build: the benchmark itself compares it."""
    monkeypatch.setattr(slab, "SLAB", 4 * 6 * 25)
    monkeypatch.setattr(slab.torch, "compile", lambda call, **options: call)
    slab._weigh.cache_clear()
    problem = make_problem(Case("psm", 6, 70, 16, 3), "cpu")
    settings = {"topk": 3, "selection": "all", "backend": "reference"}

    def loss():
        value = psm.psm_loss(problem.query, problem.key, problem.bank, **settings)
        return value, torch.autograd.grad(value, problem.query)[0]

    wanted = loss()
    for another in (eager.naive_pass, slab.slab_pass):
        with eager.another_pass(another):
            torch.testing.assert_close(loss(), wanted)
    assert psm.bank_pass is not slab.slab_pass
    slab._weigh.cache_clear()


def test_providers_give_reasons(monkeypatch):
    able, reasons = providers.select(PSM, "cpu")
    assert "matmul" in able
    assert "faiss" not in able
    assert "faiss" not in reasons  # never meant for a loss
    assert "unremix" in providers.select(Case("unremix", 4, 8, 4), "cpu")[1]["slab"].lower()
    monkeypatch.setattr(providers, "available_memory", lambda device: 1e6)
    able, reasons = providers.select(PSM, "cpu")
    assert "eager" not in able
    assert reasons["eager"].startswith("would take 1 GB of 0 GB")
