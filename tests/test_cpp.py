"""What is particular to the C++ kernels: every instruction set of this machine, threads, forks,
mining by bounds, the checks of the bindings, the build. test_ops.py runs the shared cases."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import problem
from test_ops import LOW, MEAN_ATOL, assert_agree, run, truth

from psm_kernels import __version__
from psm_kernels.ops import bank_topk, cpp, excluded
from psm_kernels.rows import unit_rows
from psm_kernels.weighted import row_ranges, weighted_pass

if cpp.unavailable() is not None:
    pytest.skip(f"cpp: {cpp.unavailable()}", allow_module_level=True)

from psm_kernels import _C

ROOT = Path(__file__).parents[1]
ISAS = _C.instruction_sets()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("PSM_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "dim", "topk"),
    [  # tails of rows (blocks of 6), slots (64) and columns (4, 32), all tile sizes, row groups
        (1, 1, 8, 1),
        (3, 63, 20, 5),
        (257, 300, 64, 5),
        (8, 2049, 128, 20),
        (13, 700, 200, 3),
        (2, 300, 1500, 64),
        (6, 129, 4096, 1),
    ],
)
def test_odd_sizes(isa, batch, size, dim, topk, dtype):
    query, key, bank, s_pos = problem(batch, size, dim, dtype=dtype)
    for selection in ("bernoulli", "expected", "all"):
        settings = {"selection": selection, "topk": topk, "count": size - size // 5}
        settings |= {"col_offset": 37, "row_offset": 1000}
        got = run(query, key, bank, s_pos, backend="cpp", **settings)
        want = truth(query, key, bank, s_pos, **settings)
        assert_agree(got, want, mean_atol=MEAN_ATOL[dtype])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_exact_products_give_exact_masks_and_indices(isa, dtype):
    query, key, bank, s_pos = problem(13, 2000, 256, dtype=dtype, few_bits=True)
    bank[1000:1400] = bank[100:500]
    settings = {"a": 8.0, "topk": 40, "col_offset": 2**33 + 5, "row_offset": 2**31}
    got = run(query, key, bank, s_pos, backend="cpp", **settings)
    want = truth(query, key, bank, s_pos, **settings)
    assert torch.equal(got.neg_count, want.neg_count.float())
    assert torch.equal(got.topk_index, want.topk_index)
    assert torch.equal(got.topk_sim, want.topk_sim.float())


def test_rare_selection_keeps_its_precision(isa):
    """Kept similarities far below the largest one, at a temperature where exp spans 2^140."""
    query, key, bank, _ = problem(5, 3000, 4)
    settings = {"temperature": 0.02, "a": 400.0, "b": 0.0, "topk": 0}
    for target in (-0.9, 0.0, 0.9):
        s_pos = torch.full((5,), target)
        for selection in ("bernoulli", "expected"):
            args = (query, key, bank, s_pos)
            got = run(*args, backend="cpp", selection=selection, **settings)
            assert_agree(got, truth(*args, selection=selection, **settings), atol=2e-5)


def exclusions(batch, size, count) -> list[dict]:
    """Lists with repetitions, at the edges of tiles and outside the bank; copies of ids within and
    across tiles, unknown ids, empty slots; all of it; a row that sees nothing."""
    g = torch.Generator().manual_seed(3)
    lists = torch.randint(-2, size + 3, (batch, 64), generator=g)
    lists[:, :8] = torch.tensor([0, 0, 63, 64, 255, 256, count - 1, count])
    lists[0] = -1
    bank_ids = torch.randint(-2, 9, (size,), generator=g)
    ids = torch.randint(-1, 12, (batch,), generator=g)
    named = {"ids": ids, "bank_ids": bank_ids}
    alone = {"ids": torch.full((batch,), 7), "bank_ids": torch.full((size,), 7)}
    alone["ids"][1:] = 8
    empty = {"bank_ids": torch.where(torch.arange(size) < 300, -2, bank_ids)}
    return [{"exclude": lists}, named, named | {"exclude": lists[:, :9].clone()}, alone, empty]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
def test_what_a_row_must_not_see_is_left_out(isa, selection, dtype):
    batch, size, count = 13, 1700, 1500
    query, key, bank, s_pos = problem(batch, size, 64, dtype=dtype, few_bits=True)
    settings = {"selection": selection, "col_offset": 37, "row_offset": 1000, "count": count}
    for hidden in exclusions(batch, size, count):
        for topk, exclude_mined in ((0, False), (7, True), (90, True), (7, False)):
            settings |= {"topk": topk, "exclude_mined": exclude_mined, **hidden}
            got = run(query, key, bank, s_pos, backend="cpp", **settings)
            want = truth(query, key, bank, s_pos, **settings)
            assert torch.equal(got.topk_index, want.topk_index)
            assert torch.equal(got.topk_sim, want.topk_sim.float())
            if selection != "expected":
                assert torch.equal(got.neg_count, want.neg_count.float())
            assert_agree(got, want, mean_atol=MEAN_ATOL[dtype])
            found = bank_topk(key, bank, 7, count=count, backend="cpp", **hidden)
            want = bank_topk(key, bank, 7, count=count, backend="reference", **hidden)
            assert torch.equal(found[1], want[1])
        for name in hidden:
            del settings[name]


def test_the_passes_of_unremix_leave_it_out_too(isa):
    batch, size, count = 13, 1700, 1500
    query, _, bank, _ = problem(batch, size, 64)
    affine, rho = torch.rand(5, batch), torch.rand(size)
    for hidden in exclusions(batch, size, count):
        exclude = excluded(hidden.get("exclude"), hidden.get("ids"), hidden.get("bank_ids"),
                           bank, batch)  # fmt: skip
        settings = {"temperature": 0.2, "exclude": exclude}
        got = row_ranges(query, bank, count, backend="cpp", **settings)
        want = row_ranges(query, bank, count, backend="reference", **settings)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
        settings |= dict(zip(("alpha", "beta", "gamma", "top", "cap"), affine, strict=True))
        got = weighted_pass(query, bank, count, rho=rho, backend="cpp", **settings)
        want = weighted_pass(query, bank, count, rho=rho, backend="reference", **settings)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def exact_topk(query, bank, k):
    scores = query.double() @ bank.double().T
    return scores.nan_to_num(-torch.inf).sort(dim=1, descending=True, stable=True)[0][:, :k]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", ["collapsed", "norms", "sparse", "constant", "bad slot"])
def test_mining_is_exact_where_the_cheap_bound_is_weak(isa, kind, dtype):
    query, _, bank, _ = problem(7, 1500, 64)
    if kind == "collapsed":  # all similarities within the error of the byte product
        bank = unit_rows(bank[:1] + 1e-3 * bank)
        query = unit_rows(bank[:1] + 1e-3 * query)
    elif kind == "norms":
        bank *= torch.logspace(-18, 18, len(bank))[:, None] if dtype is torch.float32 else 1.0
        query *= torch.tensor([1e-8, 1e-3, 0, 1, 1e3, 1e8, 1])[:, None].clamp_max(1e4)
    elif kind == "sparse":
        bank[::3] = torch.eye(64).repeat(8, 1)[: len(bank[::3])]
    elif kind == "constant":
        bank = bank[:1].repeat(1500, 1)
    else:
        bank[40, 3], bank[900, 5] = torch.nan, torch.nan
    query, bank = query.to(dtype), bank.to(dtype)
    similarity, index = bank_topk(query, bank, 30, backend="cpp")
    want = exact_topk(query, bank, 30)
    scale = 1 + want.abs().amax(1, keepdim=True)
    assert ((similarity.double() - want).abs() / scale).max() < 1e-6
    assert (index.sort(1)[0].diff(dim=1) > 0).all()
    at_index = (query.double()[:, None] * bank.double()[index]).sum(2)
    assert ((similarity.double() - at_index).abs() / scale).max() < 1e-6
    if kind == "constant":
        assert torch.equal(index, torch.arange(30).expand(7, 30))


def test_topk_of_the_whole_bank(isa):
    query, _, bank, _ = problem(5, 400, 24)
    similarity, index = bank_topk(query, bank, 500, backend="cpp")
    assert torch.equal(index[:, :400].sort(1)[0], torch.arange(400).expand(5, 400))
    torch.testing.assert_close(similarity[:, :400].double(), exact_topk(query, bank, 400))
    assert (index[:, 400:] == -1).all()


@pytest.mark.parametrize("dim", [24, 64])  # copied and padded; read where they lie
def test_views_that_are_aligned_to_elements_only(isa, dim):
    for dtype in LOW:
        query, key, bank, s_pos = problem(4, 300, dim, dtype=dtype)
        moved = torch.empty(bank.numel() + 1, dtype=dtype)[1:].view_as(bank).copy_(bank)
        args = query, key, bank, s_pos
        want = run(*args, backend="cpp")
        got = run(query, key, moved, s_pos, backend="cpp")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- finish --------------------------------------------------------------------------------------


def test_finish_does_not_depend_on_the_number_of_threads(isa, threads):
    query, key, bank, s_pos = problem(3000, 500, 60)
    swept = run(query, key, bank, s_pos, topk=20, exclude_mined=True, backend="cpp")
    weighting = {"soft_weights": "attention", "weight_temperature": 0.3, "hard_weight": 0.7}

    def finished(count):
        threads(count)
        return cpp.psm_finish(query, key, bank, s_pos, swept, temperature=0.2, **weighting)

    want = finished(1)
    got = finished(3)  # above the work from which threads are started
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- threads and processes -----------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["bernoulli", "expected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(isa, threads, selection, dtype):
    query, key, bank, s_pos = problem(70, 12000, 64, dtype=dtype)
    settings = {"selection": selection, "topk": 10, "exclude_mined": True, "backend": "cpp"}
    settings |= exclusions(70, 12000, 12000)[2]
    threads(1)
    want = run(query, key, bank, s_pos, **settings)
    for count in (2, 3, 8, 8):
        threads(count)
        got = run(query, key, bank, s_pos, **settings)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def large_pass():
    return run(*problem(64, 20000, 64), backend="cpp")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_no_thread_is_left_running(threads):
    threads(8)
    torch.mm(torch.ones(500, 500), torch.ones(500, 500))  # torch's own pool starts here
    before = len(os.listdir("/proc/self/task"))
    large_pass()
    assert len(os.listdir("/proc/self/task")) == before


def _child(queue):
    torch.set_num_threads(2)
    args = torch.load(queue.get())
    out = cpp.bank_pass(*args)
    queue.put([t.tolist() for t in out])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_a_forked_child_computes_the_same(threads, tmp_path):
    threads(2)
    query, key, bank, s_pos = problem(64, 20000, 64)
    count, rng_state = torch.tensor(20000), torch.tensor([1, 2])
    args = (query, key, bank, count, s_pos, 0.2, "bernoulli", 0.5, 0.0, 5, rng_state, 0, 0)
    want = [t.tolist() for t in cpp.bank_pass(*args)]
    torch.save(args, tmp_path / "args.pt")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    queue.put(tmp_path / "args.pt")
    child = context.Process(target=_child, args=(queue,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get(timeout=5) == want


FORKS_BEFORE_LOADING = """
import os, signal, torch
torch.set_num_threads(2)
query = torch.eye(64)
bank = query.repeat(300, 1).exp()  # torch's threads run; in the child it would wait for them
if pid := os.fork():
    raise SystemExit(os.waitpid(pid, 0)[1])
signal.alarm(60)
from psm_kernels.ops import bank_topk
bank_topk(query, bank, 3, backend="cpp")
os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="knows a fork by /proc")
def test_a_child_may_load_the_kernels_after_the_fork():
    """It has none of the threads that torch's OpenMP runtime believes in."""
    subprocess.run([sys.executable, "-c", FORKS_BEFORE_LOADING], check=True, cwd=ROOT)


# --- memory --------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def workspace(batch, count, dim, topk) -> int:
    """Bytes that a pass would ask for; the call is stopped there."""
    sizes = []

    def allocate(size):
        sizes.append(size)
        raise Stop

    with pytest.raises(Stop):
        _C.bank_pass(**call(batch, count, dim, topk) | {"allocate": allocate})
    return sizes[0]


def call(batch=4, count=10, dim=8, topk=2) -> dict:
    """Arguments of _C.bank_pass with addresses that pass its checks and are never used."""
    names = "query key bank s_pos affine rho exclude ids bank_ids"
    names += " neg_lse neg_mean neg_sq_lse neg_count topk_sim topk_index"
    arguments = dict.fromkeys(names.split(), 4096)
    arguments |= {"batch": batch, "count": count, "dim": dim, "topk": topk, "dtype": 0}
    arguments |= {"selection": 0, "temperature": 0.5, "a": 0.5, "b": 0.0, "seed": 0, "offset": 0}
    arguments |= {"row_offset": 0, "col_offset": 0, "isa": ISAS[0], "threads": 2}
    arguments |= {"listed": 3, "exclude_mined": True}
    return arguments | {"allocate": lambda size: 0}


def test_extra_memory_does_not_grow_with_the_bank():
    million = workspace(256, 1 << 20, 128, 5)
    assert million < 64e6
    assert workspace(256, 1 << 24, 128, 5) == million
    assert workspace(256, 1 << 20, 4096, 64) < 100e6


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": 0}, "query: got a null pointer"),
        ({"key": 0}, "key: got a null pointer"),
        ({"bank": 0}, "bank: got a null pointer"),
        ({"neg_lse": 0}, "neg_lse: got a null pointer"),
        ({"query": 4097}, "query: got address 4097, wanted a multiple of 4"),
        ({"bank": 4097, "dtype": 1}, "bank: got address 4097, wanted a multiple of 2"),
        ({"topk_index": 4100}, "topk_index: got address 4100, wanted a multiple of 8"),
        ({"batch": -1}, "batch: got -1"),
        ({"count": -1}, "count: got -1"),
        ({"count": 1 << 32}, "count: got 4294967296"),
        ({"dim": 0}, "dim: got 0"),
        ({"dim": 4097}, "dim: got 4097"),
        ({"topk": -1}, "topk: got -1"),
        ({"batch": 1 << 62}, "batch: got"),
        ({"dtype": 3}, "dtype: got 3"),
        ({"selection": 4}, "selection: got 4"),
        ({"selection": 3, "rho": 0}, "rho: got a null pointer"),
        ({"selection": 3, "affine": 0}, "affine: got a null pointer"),
        ({"exclude": 0}, "exclude: got a null pointer"),
        ({"exclude": 4100}, "exclude: got address 4100, wanted a multiple of 8"),
        ({"listed": -1}, "listed: got -1"),
        ({"ids": 0}, "ids: got a null pointer"),
        ({"bank_ids": 0}, "bank_ids: got a null pointer"),
        ({"temperature": 0.0}, "temperature: got 0"),
        ({"temperature": float("nan")}, "temperature: got"),
        ({"threads": 0}, "threads: got 0"),
        ({"isa": "sse9"}, "isa: got 'sse9'"),
        ({}, "workspace: got a null pointer"),
    ],
)
def test_bindings_refuse_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        _C.bank_pass(**call() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": 0}, "key: got a null pointer"),
        ({"query": 4097}, "query: got address 4097, wanted a multiple of 4"),
        ({"stats": 0}, "stats: got a null pointer"),
        ({"soft_weights": 3}, "soft_weights: got 3"),
        ({"weight_temperature": 0.0}, "weight_temperature: got 0"),
        ({"slots": 2}, "topk_index: got 2"),
        ({"slots": 3, "isa": "sse9"}, "isa: got 'sse9'"),
    ],
)
def test_finish_refuses_bad_arguments(change, message):
    index = torch.tensor([-1, 2])
    names = "query key bank s_pos neg_lse neg_mean neg_sq_lse neg_count loss grad_query stats"
    arguments = dict.fromkeys(names.split(), 4096) | {"topk_index": index.data_ptr()}
    arguments |= {"batch": 1, "slots": 3, "dim": 8, "dtype": 0, "topk": 2, "threads": 2}
    arguments |= {"temperature": 0.5, "soft_weights": 0, "weight_temperature": 1.0}
    arguments |= {"hard_weight": 1.0, "isa": ISAS[0]}
    with pytest.raises(ValueError, match=f"^{message}"):
        _C.psm_finish(**arguments | change)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("PSM_CPU_ISA", "avx9")
    with pytest.raises(ValueError, match="PSM_CPU_ISA: got 'avx9', wanted one"):
        large_pass()


# --- build ---------------------------------------------------------------------------------------


def test_a_module_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(_C, "source_id", f"{__version__}+0000000000000000")
    assert "built from other sources" in cpp.unavailable.__wrapped__()
    monkeypatch.setattr(_C, "source_id", "0.0.1")
    assert "pip install -e ." in cpp.unavailable.__wrapped__()
