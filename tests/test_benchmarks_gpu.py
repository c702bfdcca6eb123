"""benchmarks/gpu.py without a GPU: all but its clocks."""

import importlib.util
import json

import pytest
import torch

from benchmarks import gpu
from benchmarks.cases import Case
from benchmarks.providers import ours
from psm_kernels.backends.cuda import built_for

CLOCK = {"us": 20.0, "q10": 19.0, "q90": 22.0, "runs": 9}
MACHINE = {"gpu": "NVIDIA H100 80GB", "flops": 800e12, "bytes_per_s": 3e12}


@pytest.fixture
def on_the_cpu(monkeypatch):
    def timed(step, seconds, flush):
        step()
        return CLOCK

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "timed", timed)
    monkeypatch.setattr(gpu, "captured", lambda step: step)
    monkeypatch.setattr(gpu, "peak_bytes", lambda step: 12)
    monkeypatch.setattr(gpu, "capability", lambda: gpu.HOPPER)
    monkeypatch.setitem(gpu.PROVIDERS, "reference", ours("reference"))
    kinds = {"psm": 5, "bank_topk": 5, "enqueue": 0}
    cases = [Case(kind, 4, 90, 16, topk, "bf16") for kind, topk in kinds.items()]
    monkeypatch.setattr(gpu, "CASES", cases)


@pytest.mark.parametrize("group", ["reference", "eager"])
def test_a_group_measures_every_kind(group, on_the_cpu):
    rows = []
    assert gpu.measure_group(group, 60, rows.append), rows
    wanted = {
        "reference": ["reference", "reference pass", "reference"],
        "eager": ["eager", "eager", "eager"],
    }
    assert [row["backend"] for row in rows] == wanted[group]
    for row in rows:
        assert row["hot"] == row["cold"] == CLOCK
        assert row["peak_bytes"] == 12


def test_the_cuda_backend_is_measured_with_each_flag(on_the_cpu, monkeypatch):
    monkeypatch.setitem(gpu.PROVIDERS, "cuda", ours("reference"))
    monkeypatch.setattr(gpu, "Cuda", lambda **flags: gpu.registry.TABLE["reference"])
    names = [run.name for run in gpu.runs("cuda", gpu.CASES[0])]
    assert names == ["cuda", "cuda pass", *(f"cuda {name}" for name in gpu.VARIANTS)]
    if built_for() is None:
        pytest.skip("without the CUDA kernels the names of the flags are not known")
    from psm_kernels import _C

    signature = _C.cuda.bank_pass.__doc__
    assert all(f"{flag}: bool" in signature for flags in gpu.VARIANTS.values() for flag in flags)


def test_what_a_baseline_refuses_is_a_row_and_no_failure(on_the_cpu, monkeypatch):
    refuse = gpu.PROVIDERS["eager"]._replace(refuse=lambda case, device: "would take 9 GB")
    monkeypatch.setitem(gpu.PROVIDERS, "eager", refuse)
    rows = []
    assert gpu.measure_group("eager", 60, rows.append)
    assert {row["error"] for row in rows} == {"ValueError: would take 9 GB"}


def test_a_failure_is_a_row_and_the_next_run_is_measured(on_the_cpu, monkeypatch):
    def step():
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    def greedy(group, case):
        yield gpu.Run("first", step, False)
        yield gpu.Run("second", lambda: None, False)

    monkeypatch.setattr(gpu, "runs", greedy)
    for group, good in (("eager", True), ("reference", False)):
        rows = []
        assert gpu.measure_group(group, 60, rows.append) == good
        first, second = rows[:2]
        assert first["backend"] == "first"
        assert first["error"] == "OutOfMemoryError: tried to allocate"
        assert second["backend"] == "second"
        assert "hot" in second


def test_a_case_that_breaks_is_a_row_and_the_next_case_runs(on_the_cpu, monkeypatch):
    def broken(group, case):
        yield gpu.Run("first", lambda: None, False)
        if case.operation == "psm":
            raise RuntimeError("an illegal address\nwas met")

    monkeypatch.setattr(gpu, "runs", broken)
    rows = []
    assert not gpu.measure_group("reference", 60, rows.append)
    first, second = (row for row in rows if row["kind"] == "psm")
    assert first["backend"] == "first"
    assert "hot" in first
    assert second["error"] == "RuntimeError: an illegal address"
    assert "hot" not in second
    assert any(row["kind"] == "bank_topk" and "hot" in row for row in rows)


def test_a_backend_that_cannot_run_is_a_failure(on_the_cpu, monkeypatch):
    cuda = gpu.registry.TABLE["cuda"]
    monkeypatch.setattr(cuda, "unavailable", lambda: "it was built without")
    rows = []
    assert not gpu.measure_group("cuda", 60, rows.append)
    assert rows == [{"error": "it was built without"}]


@pytest.mark.parametrize(
    ("last", "why"),
    [("os._exit(3)", "ended with status 3"), ("time.sleep(600)", "stopped after 3 s"), ("0", None)],
)
def test_rows_survive_a_process_that_dies_or_hangs(last, why, tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(f"import os, time\nprint('noise\\n{{\"a\": 1}}', flush=True)\n{last}\n")
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "GRACE", 2)
    assert gpu.start_group("cuda", 1) == ([{"a": 1}], why)


def row(backend: str, **rest) -> dict:
    about = {"kind": "psm", "shape": [256, 65_536, 128, 5], "dtype": "bf16", "backend": backend}
    return about | rest


def test_the_report_holds_what_was_measured(tmp_path, monkeypatch, capsys):
    times = {"hot": CLOCK, "cold": CLOCK | {"us": 30.0}, "peak_bytes": 5, "graph": True}
    groups = {
        "machine": ([MACHINE], None),
        "triton": ([row("triton", **times), row("triton", error="ValueError: no")], "status 1"),
        "cuda": ([{"error": "no CUDA kernels"}], "ended with status 1"),
        "eager": ([row("eager", **times)], None),
        "compile": ([], None),
        "slab": ([], None),
    }
    monkeypatch.setattr(gpu, "start_group", lambda group, seconds: groups[group])
    assert gpu.run_groups(60, tmp_path / "new") == 1
    result = json.loads((tmp_path / "new/NVIDIA_H100_80GB.json").read_text())
    assert result["failed"] == {"triton": "status 1", "cuda": "no CUDA kernels"}
    assert [r["backend"] for r in result["rows"]] == ["triton", "triton", "eager"]
    measured = result["rows"][0]
    assert measured["roofline_us"] == pytest.approx(3 * 2 * 256 * 65_536 * 128 / 800e6)
    assert measured["share_of_roofline"] == pytest.approx(measured["roofline_us"] / 20)
    assert result["versions"]["torch"]
    assert "commit" in result["versions"]
    printed = capsys.readouterr().out
    assert "ValueError: no" in printed
    assert "(target 40)" in printed
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "new/NVIDIA_H100_80GB.png").stat().st_size > 1000


def test_a_group_gets_what_those_before_it_left(tmp_path, monkeypatch):
    now, shares, takes = [100.0], {}, {"machine": 10, "cuda": 60, "triton": 20}

    def start(group, seconds):
        shares[group] = seconds
        now[0] += takes.get(group, 1)
        return [MACHINE] if group == "machine" else [], None

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "start_group", start)
    gpu.run_groups(160, tmp_path)
    assert shares == {
        "machine": 30, "cuda": 30, "triton": 22.5, "eager": pytest.approx(70 / 3), "compile": 34.5,
        "slab": 68,
    }  # fmt: skip


def test_without_a_gpu_the_program_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "start_group", lambda group, seconds: ([], "ended with status 1"))
    with pytest.raises(SystemExit, match="the GPU could not be measured: ended with status 1"):
        gpu.run_groups(60, None)
