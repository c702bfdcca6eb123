"""The logic of benchmarks/ that needs no clock: tables, README markers, the guard's comparison."""

import copy
import dataclasses
import json
import subprocess
import sys

import pytest

from benchmarks import guard, report, tables
from benchmarks.cases import Case

PSM = Case("psm", 256, 65_536, 128, 5)
TOPK = Case("bank_topk", 256, 65_536, 128, 5)


def row(case: Case, provider: str, median: float, memory: int | None = None, same_job=True):
    numbers = {"median": median, "low": median, "high": median, "rounds": 5}
    rest = {"provider": provider, "cache": "warm", "same_job": same_job, "memory": memory}
    return {**dataclasses.asdict(case), **numbers, **rest}


@pytest.fixture
def results() -> dict:
    about = {
        "device": "cpu",
        "name": "a-cpu-2-cores",
        "cpu": "A CPU",
        "cores": 2,
        "threads": 2,
        "memory_gb": 8,
    }
    steps = [
        {"size": 16_384, "provider": "cpp", "skipped": None, "step": 10.0, "loss": 0.5},
        {"size": 16_384, "provider": "eager", "skipped": "would take 14 GB of 8 GB"},
    ]
    return {
        "machine": {**about, "memory_gb": 8, "instructions": "avx512"},
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


@pytest.fixture
def readmes(monkeypatch, tmp_path):
    """Two of them, and a run of the report on stored results."""
    paths = [tmp_path / name for name in ("README.md", "other.md")]
    monkeypatch.setattr(report, "READMES", paths)
    return paths


def test_readmes_are_filled_checked_and_stable(results, readmes, tmp_path, capsys):
    stored = tmp_path / "default.json"
    stored.write_text(json.dumps(results))
    outside = ("# Title\n\n", "\n\n## After\n")
    for readme, name in zip(readmes, ("cpu:short", "cpu"), strict=True):
        marker = f"<!-- benchmark:{name} -->\nold\n<!-- /benchmark:{name} -->"
        readme.write_text(marker.join(outside))
    command = [str(stored), "--no-pictures"]
    assert report.main([*command, "--check"]) == 1
    assert "differs" in capsys.readouterr().out
    assert report.main([*command, "--readme"]) == 0
    for readme in readmes:
        text = readme.read_text()
        assert text.startswith(outside[0])
        assert text.endswith(outside[1])
        assert "old" not in text
    assert "\n".join(tables.table(results)) in text
    assert report.main([*command, "--check"]) == 0
    readmes[1].write_text(text.replace("| 129 |", "| 1 |"))  # a figure typed by hand
    assert report.main([*command, "--check"]) == 1


def test_the_readmes_say_what_the_results_say():
    assert report.main(["--check"]) == 0


def test_sections_of_a_readme_come_from_their_kind_of_run(results):
    swept = copy.deepcopy(results) | {"sweep": True, "name": "sweep"}
    hard = dataclasses.replace(TOPK, bank="sorted")
    swept["rows"] = [row(TOPK, "cpp", 0.05), row(hard, "cpp", 0.1), row(hard, "eager", 0.4)]
    names = [f"cpu:{name}" for name in ("methods", "training", "sweep", "banks")]
    markers = [f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->" for name in names]
    methods, training, sweep, banks = (report.fill(m, [results, swept]) for m in markers)
    assert "`psm`" in methods
    assert "bank_topk" not in methods
    assert "5.0%" in training
    assert "results/a-cpu-2-cores/sweep-time.svg" in sweep
    assert f"- {TOPK}, over a random bank: sorted 2.00x" in banks
    assert "Not measured yet." in report.fill(markers[2], [results])


def test_the_processor_with_lower_ratios_comes_first(results):
    other = copy.deepcopy(results)
    other["machine"]["name"] = "other-cpu-4-cores"
    other["rows"][1]["median"] /= 2  # of eager
    for stored in ([results, other], [other, results]):
        both = report.excerpt(stored, "cpu", None)
        assert both.index("other-cpu-4-cores") < both.index("a-cpu-2-cores")
        short = report.excerpt(stored, "cpu", "short")
        assert "| `psm`, 256 x 65,536, fp32 | 129 | 0.31x | 5.00x |" in short
        assert "faiss 0.80x" in short
        assert "10x" not in short
        assert "a-cpu-2-cores, where the ratios are higher" in short


def test_readme_without_markers_or_with_unknown_ones_is_refused(results):
    def marker(name):
        return f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->"

    with pytest.raises(ValueError, match="no markers"):
        report.fill("# Title", [results])
    with pytest.raises(ValueError, match="benchmark:cpu:colors, wanted"):
        report.fill(marker("cpu:colors"), [results])
    with pytest.raises(ValueError, match="benchmark:gpus:None, wanted"):
        report.fill(marker("gpus"), [results])
    for name in ("cuda", "fashion:accuracy"):
        assert "Not measured yet." in report.fill(marker(name), [results])


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
    assert kept == results | {"name": "cpu", "path": tmp_path / "cpu"}


def test_pictures(results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.pictures import draw, draw_overview

    def sizes_and_draw(*divisors):
        rows = copy.deepcopy(results["rows"][:5])
        for divisor in divisors:
            results["rows"] += [{**one, "size": one["size"] // divisor} for one in rows]
        return {path.name for path in draw(results, tmp_path / "m.json")}

    assert sizes_and_draw(4) == {"m-ratios.svg"}  # two sizes are no curve
    assert draw_overview([results], tmp_path / "o.svg") == []
    assert sizes_and_draw(16) == {f"m-{name}.svg" for name in ("time", "memory", "ratios")}
    assert draw_overview([results, results], tmp_path / "o.svg") == [tmp_path / "o.svg"]


# --- the guard -----------------------------------------------------------------------------------

STORED = {"a": {"eager": 0.1, "matmul": 3.0}}


def test_guard_allows_30_percent_against_every_base():
    assert guard.losses({"a": {"eager": 0.129, "matmul": 3.8}}, STORED) == []
    assert guard.losses({"a": {"eager": 0.5, "matmul": 3.8}}, STORED) == []  # eager's own affair
    assert guard.losses({"a": {"eager": 0.15, "matmul": 4.0}}, STORED) == [
        "a takes 33% more than stored"
    ]
    assert len(guard.losses({"b": {"eager": 0.1}}, STORED)) == 1  # a new shape is not a pass


def test_guard_fails_where_bf16_falls_behind_fp32():
    stored = {"b": {"eager": 0.1, "fp32": 0.7}}
    assert guard.losses({"b": {"eager": 0.1, "fp32": 0.99}}, stored) == []
    (line,) = guard.losses({"b": {"eager": 0.1, "fp32": 1.1}}, stored)
    assert "1.10 times as long as fp32" in line
    slow = {"b": {"eager": 0.1, "fp32": 1.2}}  # a processor without products of bf16
    assert guard.losses({"b": {"eager": 0.1, "fp32": 1.4}}, slow) == []


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


def test_batches_have_a_line_for_each_size(monkeypatch):
    """Everybody gives the same value; who is not there is named."""
    from benchmarks import batches

    def missing():
        raise ModuleNotFoundError("no such peer")

    for method, providers in batches.METHODS.items():
        here = {name: providers[name] for name in ("ours", "passes", "eager")} | {"peer": missing}
        monkeypatch.setitem(batches.METHODS, method, here)
        monkeypatch.setattr(batches, "peak", lambda method, name, batch, dim: 3_000_000)
        head, body, left_out = batches.table(method, [4, 33], [8], 0.0)
        assert head == ["B x D", "ours, ms", "passes", "eager", "peer", "memory, ours / eager"]
        assert [cells[0] for cells in body] == ["4 x 8", "33 x 8"]
        assert all(cells[2].endswith("x") and cells[3].endswith("x") for cells in body)
        assert all(cells[4:] == ["", "3 MB / 3 MB"] for cells in body)
        assert left_out == {"peer": "ModuleNotFoundError: no such peer"}
    assert batches.worker("clip", "ours", "64", "8") is None


def test_batches_that_disagree_are_an_error(monkeypatch):
    from benchmarks import batches

    wrong = {"eager": lambda: lambda query, key: (query * key).sum()}
    monkeypatch.setitem(batches.METHODS, "clip", batches.METHODS["clip"] | wrong)
    monkeypatch.delitem(batches.METHODS["clip"], "compile")
    with pytest.raises(AssertionError, match="eager"):
        batches.measure("clip", 4, 8, 0.0)


def test_mining_says_how_many_times_ours(tmp_path):
    from benchmarks import mining

    rows = {"ours": {"median": 2.0, "memory": 50_000_000}, "slab": {"median": 7.0, "memory": 10**8}}
    cells = mining.line("float16", 100_000_000, rows)
    assert len(cells) == len(mining.HEAD)
    assert cells == ["float16, 100 MB", "2.0", "", "3.50x", "50 MB, 0.50x", "", "100 MB, 1.00x"]


def test_mining_runs(tmp_path):
    from benchmarks.machine import ROOT

    size = ["--queries", "20", "--rows", "3000", "--dim", "32", "--k", "10", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.mining", *size, "--folder", tmp_path],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    _, _, first, second, *left_out = done.stdout.splitlines()
    for kind, text in (("float32, 0 MB", first), ("float16, 0 MB", second)):
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        assert cells[0] == kind
        assert cells[1]
        assert cells[3].endswith("x")
    assert all(" faiss is left out: " in text for text in left_out)
    assert not list(tmp_path.iterdir())
