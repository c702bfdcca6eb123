"""The logic of benchmarks/ that needs no clock: tables, README markers, the guard's comparison."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch

from benchmarks import eager, guard, measure, providers, report, slab, tables, test_operations
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
from psm_kernels.functional import psm_loss

PSM = Case("psm", 256, 65_536, 128, 5)
TOPK = Case("bank_topk", 256, 65_536, 128, 5)


def row(case: Case, provider: str, median: float, memory: int | None = None, same_job=True):
    numbers = {"median": median, "low": median, "high": median, "rounds": 5}
    rest = {"provider": provider, "cache": "warm", "same_job": same_job, "memory": memory}
    return {**dataclasses.asdict(case), **numbers, **rest}


@pytest.fixture
def results() -> dict:
    about = {"device": "cpu", "cpu": "A CPU", "cores": 2, "threads": 2, "memory_gb": 8}
    steps = [
        {"size": 16_384, "provider": "cpp", "skipped": None, "step": 10.0, "loss": 0.5},
        {"size": 16_384, "provider": "eager", "skipped": "would take 14 GB of 8 GB"},
    ]
    return {
        "machine": {**about, "instructions": "avx512"},
        "ours": "cpp",
        "sweep": False,
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
        "training": {"batch": 256, "edge": 32, "rows": steps},
    }


def test_case_costs():
    assert PSM.flops == 3 * 2 * 256 * 65_536 * 128
    assert PSM.traffic == 65_536 * 128 * 4
    assert dataclasses.replace(PSM, dtype="bf16").traffic == 65_536 * 128 * 2


def test_share_of_the_roofline_is_of_the_slower_of_products_and_traffic():
    products = PSM.flops / 100e9
    assert tables.share(PSM, 2 * products, {"fp32": 100e9, "copy": 1e15}) == "50%"
    traffic = PSM.traffic / 1e6
    assert tables.share(PSM, 4 * traffic, {"fp32": 1e15, "copy": 1e6}) == "25%"


def test_table_has_ours_in_milliseconds_and_others_as_ratios(results):
    head, _, first, second = tables.table(results)
    assert "ours (`cpp`), ms" in head
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[:7] == ["`psm`", "256", "65,536", "128", "5", "fp32", "129"]
    assert cells[7:] == ["0.31x", "10x", "", "", "", "30 MB", "600 MB", "100%"]
    assert "faiss 0.80x" in second
    assert all(line.count("|") == head.count("|") for line in (first, second))


def test_wins_and_ties_are_said(results):
    lines = tables.not_fastest(results)
    assert lines == [
        f"eager ties {TOPK}: 1.02x our time",
        f"faiss wins {TOPK}: 1.25x faster than ours",
    ]
    results["rows"] = results["rows"][:3]  # the product is faster and is no competitor
    assert tables.not_fastest(results) == ["No competitor wins or ties in what was measured."]


def test_text_sorts_by_time_and_says_what_was_skipped(results):
    text = "\n".join(tables.text(results))
    assert text.index("faiss") < text.index("* cpp                     50")
    assert "liger: runs on cuda alone (psm-B256" in text
    assert "(matmul)" in text
    assert "| 16,384 | `cpp` | 10.0 | 500 | 5.0% |" in text
    assert "| 16,384 | `eager` |  |  | would take 14 GB" in text


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
    assert "\n".join(tables.table(results)) in text
    assert report.main([*command, "--check", str(readme)]) == 0
    readme.write_text(text.replace("| 129 |", "| 1 |"))  # a figure typed by hand
    assert report.main([*command, "--check", str(readme)]) == 1


def test_sections_of_a_readme_come_from_their_kind_of_run(results):
    swept = copy.deepcopy(results) | {"sweep": True, "name": "m-sweep"}
    hard = dataclasses.replace(TOPK, bank="sorted")
    swept["rows"] = [row(TOPK, "cpp", 0.05), row(hard, "cpp", 0.1), row(hard, "eager", 0.4)]
    markers = [f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->" for name in (
        "cpu:methods", "cpu:training", "cpu:sweep")]  # fmt: skip
    methods, training, sweep = (report.fill(marker, [results, swept]) for marker in markers)
    assert "`psm`" in methods
    assert "bank_topk" not in methods
    assert "5.0%" in training
    assert f"- {TOPK}, over a random bank: sorted 2.00x" in sweep
    assert "benchmarks/results/m-sweep-time.svg" in sweep
    assert "Not measured yet." in report.fill(markers[2], [results])


def test_readme_without_markers_or_results_is_refused(results):
    with pytest.raises(ValueError, match="no markers"):
        report.fill("# Title", [results])
    with pytest.raises(ValueError, match="no results for it"):
        report.fill("<!-- benchmark:cuda -->\n<!-- /benchmark:cuda -->", [results])
    with pytest.raises(ValueError, match="benchmark:cpu:colors, wanted"):
        report.fill("<!-- benchmark:cpu:colors -->\n<!-- /benchmark:cpu:colors -->", [results])


def test_tables_of_digits_are_kept_as_they_are(results):
    digits = {"name": "digits", "tables": {"accuracy": [["", "kNN"], [["PSM", "91% ± 1%"]]]}}
    marker = "<!-- benchmark:digits:{0} -->\n<!-- /benchmark:digits:{0} -->"
    assert "| PSM | 91% ± 1% |" in report.fill(marker.format("accuracy"), [results, digits])
    with pytest.raises(ValueError, match=r"digits:purity, wanted one of \['accuracy'\]"):
        report.fill(marker.format("purity"), [results, digits])
    assert "| PSM |" in report.document(digits)


def test_results_of_another_form_are_left_out(results, tmp_path):
    for name, found in (("cpu", results), ("gpu", {"gpu": "H100", "rows": []})):
        (tmp_path / name).write_text(json.dumps(found))
    (kept,) = report.load([tmp_path / "cpu", tmp_path / "gpu"])
    assert kept == results | {"name": "cpu"}


def test_pictures(results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.pictures import draw

    def sizes_and_draw(*divisors):
        rows = copy.deepcopy(results["rows"][:5])
        for divisor in divisors:
            results["rows"] += [{**one, "size": one["size"] // divisor} for one in rows]
        return {path.name for path in draw(results, tmp_path / "m.json")}

    assert sizes_and_draw(4) == {"m-ratios.png", "m-ratios.svg"}  # two sizes are no curve
    assert sizes_and_draw(16) == {
        f"m-{n}.{e}" for n in ("time", "memory", "ratios") for e in ("png", "svg")
    }


# --- the guard -----------------------------------------------------------------------------------

STORED = {"a": {"eager": 0.1, "matmul": 3.0}}


def test_guard_allows_30_percent_against_every_base():
    assert guard.losses({"a": {"eager": 0.129, "matmul": 3.8}}, STORED) == []
    assert guard.losses({"a": {"eager": 0.5, "matmul": 3.8}}, STORED) == []  # eager's own affair
    assert guard.losses({"a": {"eager": 0.15, "matmul": 4.0}}, STORED) == [
        "a takes 33% more than stored"
    ]
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


def test_guard_measures_again_before_it_fails(guarded, capsys):
    good, bad = STORED, {"a": {"eager": 0.2, "matmul": 6.0}}
    assert guarded() == 0
    assert "SKIPPED" in capsys.readouterr().out  # nothing stored for this machine
    assert guarded(good, bad, good, words=["--update"]) == 0
    assert guarded(good) == 0
    assert guarded(bad, bad, good) == 0
    assert guarded(bad, bad, bad) == 1
    assert "LOSS a takes 100% more" in capsys.readouterr().out


# --- the harness ---------------------------------------------------------------------------------


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


def test_baseline_and_slab_compute_our_loss(monkeypatch):
    """With every negative kept there is no noise between them; three slabs. `compile` is eager's
    code and takes seconds to build: the benchmark itself compares it."""
    monkeypatch.setattr(slab, "SLAB", 4 * 6 * 25)
    monkeypatch.setattr(slab.torch, "compile", lambda call, **options: call)
    slab._weigh.cache_clear()
    problem = make_problem(Case("psm", 6, 70, 16, 3), "cpu")
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)  # every negative is kept
    given, rows = (problem.query, problem.key, problem.bank), []
    for loss in (
        lambda: psm_loss(*given, topk=3, selection="all", backend="reference"),
        lambda: psm_loss(*given, topk=3, selection="all", backend=slab.Slab()),
        lambda: eager.psm_step(problem),
    ):
        value = loss()
        rows.append((value, torch.autograd.grad(value, problem.query)[0]))
    for other in rows[1:]:
        torch.testing.assert_close(other, rows[0])
    slab._weigh.cache_clear()


def test_providers_give_reasons(monkeypatch):
    def refuse(name, case=PSM):
        return providers.PROVIDERS[name].refuse(case, "cpu")

    assert refuse("matmul") is None
    assert refuse("faiss") == providers.OTHER_JOB
    assert "UnReMix" in refuse("slab", Case("unremix", 4, 8, 4))
    monkeypatch.setattr(providers, "available_memory", lambda device: 1e6)
    assert refuse("eager").startswith("would take 1 GB of 0 GB")


def test_long_calls_are_foreseen():
    sizes = {1024: 0.05, 4096: 0.1, 16_384: 0.019}  # the last one is too short to tell
    rows = [row(dataclasses.replace(PSM, size=k), "slab", time) for k, time in sizes.items()]
    rows.append(row(PSM, "eager", 1.0))
    assert test_operations.forecast(rows, PSM, "slab") == pytest.approx(0.1 * 16)
    assert test_operations.forecast(rows, PSM, "cpp") == 0.0
