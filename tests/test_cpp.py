"""What is particular to the C++ kernels: every instruction set of this machine, threads, forks,
mining by bounds, the checks of the bindings, the build. test_ops.py runs the shared cases."""

from __future__ import annotations

import copy
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import problem
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import LOW, MEAN_ATOL, assert_agree, run, truth

from psm_kernels import MemoryBank, __version__, noise
from psm_kernels._csrc import source_id
from psm_kernels.backends import compiled
from psm_kernels.backends.base import NOTHING
from psm_kernels.backends.cpp import Cpp, instruction_set
from psm_kernels.ops import bank_topk, excluded
from psm_kernels.options import PassOptions, PSMOptions
from psm_kernels.rows import unit_rows
from psm_kernels.weighted import row_ranges, weighted_pass

if Cpp().unavailable() is not None:
    pytest.skip(f"cpp: {Cpp().unavailable()}", allow_module_level=True)

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


@pytest.mark.parametrize("dim", [32, 20])  # the panel from 16-bit rows where they lie; from copies
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_small_number_of_a_bank_is_read_as_it_is(isa, dtype, dim):
    """Subnormals, zeros of either sign and what is next to them: in similarities, exact products
    and the mean."""
    bits = torch.arange(256 * dim).remainder(0x0900)
    bits += 0x3000 * (dtype is torch.bfloat16)  # no subnormals there: their scale is 1e-38
    bits[1::2] += 0x8000 - 0x10000
    bank = bits.to(torch.int16).view(dtype).view(256, dim)
    query = torch.eye(dim, dtype=dtype)
    largest = float(bank.abs().max())
    options = PassOptions(temperature=largest / 4, topk=256)
    count = torch.tensor(256)
    got = Cpp().bank_pass(query, query, bank, count, torch.zeros(dim), options)
    want = (bank.double().T / options.temperature).logsumexp(1)
    torch.testing.assert_close(got.neg_lse.double(), want, rtol=1e-6, atol=1e-6)
    weight = (bank.double().T / options.temperature).softmax(1)
    if instruction_set() != "avx512_bf16":
        mean = (weight @ bank.double()) / largest
        torch.testing.assert_close(got.neg_mean.double() / largest, mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.topk_sim, bank.float().T.sort(dim=1, descending=True)[0])


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


# --- step ----------------------------------------------------------------------------------------

RNG_STATE = torch.tensor([2**40 + 7, 5])


def step(query, key, bank, count=None, *, exclude=NOTHING, row_offset=0, **settings):
    count = torch.tensor(len(bank) if count is None else count)
    own = {"temperature": 0.2, "weight_temperature": 0.5, "reduction": "none"}
    options = PSMOptions(**own | settings)
    return Cpp().psm_step(query, key, bank, count, options, exclude, RNG_STATE, row_offset)


def true_step(query, key, bank, count=None, *, temperature=0.2, topk=5, a=0.5, b=0.0,
              selection="bernoulli", soft_weights="attention", weight_temperature=0.5,
              hard_weight=1.0):  # fmt: skip
    """Loss rows and the gradient of their sum in float64, by autograd, from what a step reads: unit
    rows, rounded to the bank's dtype where they mine and where they are negatives."""
    dtype, bank = bank.dtype, bank.double()[:count]
    leaf = query.double().requires_grad_()
    unit, key = unit_rows(leaf, torch.float64), unit_rows(key.double(), torch.float64)
    s_pos = (unit * key).sum(1)
    rounded = unit + (unit.detach().float().to(dtype).double() - unit.detach())
    near = key.float().to(dtype).double() @ bank.T
    index = near.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    s = rounded @ bank.T
    p = noise.keep_weight(
        s.detach(), s_pos.detach()[:, None],
        noise.philox_words(torch.arange(len(query)), torch.arange(len(bank)), RNG_STATE),
        selection, a, b,
    )  # fmt: skip
    p = p.double().scatter(1, index, 0.0)
    plus = s_pos / temperature
    logits = torch.where(p > 0, s / temperature + p.log(), -torch.inf)
    relative = logits - plus[:, None]
    top = torch.cat((relative, torch.zeros_like(plus)[:, None]), 1).amax(1).detach()
    others = torch.exp(relative - top[:, None]).sum(1)
    hard = top + torch.log(torch.exp(-top) + others)
    hard = torch.where(top == 0, torch.log1p(others), hard)
    mined = (unit[:, None] * bank[index]).sum(2)  # (B, k)
    m = mined / temperature - plus[:, None]
    soft = torch.logsumexp(torch.cat((hard[:, None], m), 1), 1) if topk else hard
    if soft_weights == "attention":
        w = (mined / weight_temperature).softmax(1)
    else:
        w = torch.ones_like(mined) / (index.shape[1] if soft_weights == "uniform" else 1)
    loss = soft + (w * (soft[:, None] - m)).sum(1) + hard_weight * hard
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def assert_step(got, want, dtype):
    """Each loss, and each row of the gradient by its length. The negatives of a bf16 bank weigh in
    bf16 where the bf16 dot product is used."""
    rough = torch.bfloat16 if instruction_set() == "avx512_bf16" else None
    for name, a, b in zip(("loss", "gradient"), got, want, strict=True):
        rtol = 4e-3 if (name, dtype) == ("gradient", rough) else 1e-4
        a, b = a.double().reshape(len(b), -1), b.reshape(len(b), -1)
        error = (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-300)
        assert error.max() < rtol, f"{name}: off by {error.max():.1e} of its size"


def pairs(batch, size, dim, dtype=torch.float32, **options):
    """Queries and keys of any length that are alike."""
    query, key, bank, _ = problem(batch, size, dim, dtype=dtype, **options)
    length = torch.logspace(-1, 1, batch)[:, None]
    return length * query, 3 * query + key, bank


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "dim", "topk"),
    [(1, 70, 8, 5), (13, 300, 20, 20), (7, 1000, 129, 0), (64, 700, 64, 5), (3, 90, 511, 20)],
)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
def test_step(isa, selection, batch, size, dim, topk, dtype):
    query, key, bank = pairs(batch, size, dim, dtype)
    settings = {"selection": selection, "topk": topk, "count": size - 7, "hard_weight": 0.7}
    for soft_weights in ("attention", "uniform", "binary")[: 3 if topk else 1]:
        settings["soft_weights"] = soft_weights
        got = step(query, key, bank, **settings)
        want = true_step(query, key, bank, **settings)
        assert_step(got, want, dtype)


def test_step_of_rows_of_any_length(isa):
    """Their squares are no numbers in fp32. Zeros have no direction: no gradient of their norm."""
    query, key, bank = pairs(6, 200, 24)
    want = step(query, key, bank, selection="all")
    scale = torch.tensor([1e30, 1e-30, 1.0, 1e18, 1e-18, 0.0])[:, None]
    loss, gradient = step(query * scale, key * scale.flip(0), bank, selection="all")
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss[1:5], want[0][1:5], rtol=1e-5, atol=0)
    torch.testing.assert_close((gradient * scale)[1:5], want[1][1:5], rtol=1e-4, atol=1e-5)


def test_step_on_an_empty_bank(isa):
    query, key, bank = pairs(9, 50, 30)
    loss, gradient = step(query, key, bank, 0)
    assert not loss.any()
    assert not gradient.any()
    loss, gradient = step(query[:0], key[:0], bank)
    assert (loss.shape, gradient.shape) == ((0,), (0, 30))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_a_number_spoils_its_step_alone(isa, bad, dtype):
    query, key, bank = pairs(14, 400, 40, dtype)
    want = step(query, key, bank)
    query[5, 3], key[8, 0] = bad, bad
    got = step(query, key, bank)
    rest = torch.tensor([i not in (5, 8) for i in range(14)])
    for a, b in zip(got, want, strict=True):
        # Whom a row shares the loads of a product with may move its last bit.
        torch.testing.assert_close(a[rest], b[rest], rtol=1e-5, atol=1e-6)
        assert not a[~rest].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_step_rounds_unit_rows_as_torch_does(isa, dtype):
    """With one slot, which is kept, the loss gives its similarity to the rounded query."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(300, 40, generator=g) * torch.logspace(0, -9, 40)  # subnormal in fp16
    query[0] = torch.tensor([1.0 + 2.0**-9, 1.0 + 3 * 2.0**-9] * 20)
    query = unit_rows(query)
    bank = torch.eye(40, dtype=dtype)
    index = torch.arange(300) % 40
    for slot in range(40):
        rows = index == slot
        got = Cpp().bank_pass(query[rows].to(dtype), None, bank[slot : slot + 1], torch.tensor(1),
                              torch.zeros(int(rows.sum())), PassOptions(1.0))  # fmt: skip
        loss, _ = step(query[rows], -query[rows], bank[slot : slot + 1], temperature=1.0, topk=0,
                       selection="all", hard_weight=0.0)  # fmt: skip
        # -1 is the similarity to the key: log(1 + exp(s + 1))
        want = torch.log1p(torch.exp(got.neg_lse.double() + 1))
        torch.testing.assert_close(loss.double(), want, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_small_losses_keep_their_digits(isa, dtype):
    """InfoNCE, of losses about 1e-6."""
    g = torch.Generator().manual_seed(0)
    query = unit_rows(torch.randn(1, 32, generator=g)).repeat(5, 1)
    bank = unit_rows(0.6 * torch.randn(40, 32, generator=g) - query[:1]).to(dtype)
    key = query + 0.05 * torch.randn(5, 32, generator=g)
    settings = {"temperature": 0.06, "topk": 0, "selection": "all", "hard_weight": 0.0}
    got, want = step(query, key, bank, **settings), true_step(query, key, bank, **settings)
    assert ((want[0] > 1e-8) & (want[0] < 1e-5)).all()
    assert_step(got, want, dtype)


def test_a_step_does_not_depend_on_the_number_of_threads(isa, threads):
    query, key, bank = pairs(3000, 500, 60)

    def stepped(count):
        threads(count)
        return step(query, key, bank, topk=20)

    want = stepped(1)
    for count in (2, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(stepped(count), want, strict=True))


# --- enqueue -------------------------------------------------------------------------------------


def assert_same_bits(got: MemoryBank, want: MemoryBank):
    bits = {4: torch.int32, 2: torch.int16}[want.bank.element_size()]
    assert torch.equal(got.bank.view(bits), want.bank.view(bits))
    for name in ("labels", "ids", "ptr", "count"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def hard_keys(rows, dim, seed=0):
    """Ordinary ones; zeros; NaN; infinities; squares and norms beyond fp32, either way; halves of
    a unit in the last place of bf16 and fp16."""
    keys = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    keys[1] = 0
    keys[2, 3], keys[3, 0], keys[4, 1] = torch.nan, torch.inf, -torch.inf
    keys[5:12] *= torch.tensor([1e30, 1e-30, 1e38, 1e-38, 3e-39, 1e-44, 1e-20])[:, None]
    keys[12] = torch.finfo(torch.float32).max  # its norm is infinite
    keys[13] *= torch.logspace(0, -9, dim)  # subnormal in fp16
    keys[14] = 0
    keys[14, :3] = torch.tensor([1.0, 2.0**-8 + 2.0**-16, 2.0**-11 + 2.0**-22])
    keys[15] = 0
    keys[15, dim - 1] = -1e-38
    return keys


@pytest.mark.parametrize("key_dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dim", [5, 64, 100])
def test_enqueue_writes_the_bits_of_torch(isa, dim, dtype, key_dtype):
    """Around the ring, more rows than it has, with and without names, rows that are not dense."""
    got, want = (MemoryBank(41, dim, dtype=dtype) for _ in range(2))
    for seed, rows in enumerate((16, 40, 16, 17, 100, 41)):
        keys = hard_keys(rows, 2 * dim, seed).to(key_dtype)[:, ::2]
        labels = torch.arange(2 * rows)[::2] if seed % 2 else None
        ids = torch.arange(rows) - 3 if seed % 3 else None
        got.enqueue(keys, labels, ids=ids, backend="cpp")
        want.enqueue(keys, labels, ids=ids, backend="reference")
        assert_same_bits(got, want)


any_float = st.floats(width=32).map(lambda x: 0.0 if x != x else x)  # one NaN spoils every row


@given(
    rows=st.lists(st.lists(any_float, min_size=3, max_size=3), min_size=1, max_size=9),
    dtype=st.sampled_from(LOW),
    isa=st.sampled_from(ISAS),
)
@settings(deadline=None, max_examples=150)
def test_enqueue_of_any_floats_writes_the_bits_of_torch(rows, dtype, isa):
    got, want = (MemoryBank(5, 3, dtype=dtype) for _ in range(2))
    with mock.patch.dict(os.environ, PSM_CPU_ISA=isa):
        got.enqueue(torch.tensor(rows), backend="cpp")
    want.enqueue(torch.tensor(rows), backend="reference")
    assert_same_bits(got, want)


def test_enqueue_does_not_depend_on_the_number_of_threads(isa, threads):
    keys, labels = torch.randn(9001, 256), torch.arange(9001)  # worth four threads
    want = MemoryBank(8000, 256)
    want.enqueue(keys, labels, backend="reference")
    for count in (1, 2, 3, 8):
        threads(count)
        got = MemoryBank(8000, 256)
        got.enqueue(keys, labels, backend="cpp")
        assert_same_bits(got, want)


def test_enqueue_takes_a_pointer_and_a_count_as_torch_does(isa):
    got, want = MemoryBank(7, 4), MemoryBank(7, 4)
    for bank, backend in ((got, "cpp"), (want, "reference")):
        bank.ptr.fill_(-3)
        bank.count.fill_(9)
        bank.enqueue(torch.arange(12.0).reshape(3, 4) + 1, backend=backend)
    assert_same_bits(got, want)


def test_a_backward_that_would_read_overwritten_rows_is_refused():
    bank = MemoryBank(8, 4)
    query = torch.randn(2, 4, requires_grad=True)
    similarity = query @ bank.bank.T
    bank.enqueue(torch.randn(3, 4), backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        similarity.sum().backward()


def test_enqueue_in_inference_mode():
    keys = torch.randn(3, 4)
    want = MemoryBank(8, 4)
    want.enqueue(keys, backend="cpp")
    with torch.inference_mode():
        for got in (MemoryBank(8, 4), copy.deepcopy(want)):
            got.reset()
            got.enqueue(keys, backend="cpp")
            assert_same_bits(got, want)


# --- few queries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dim", [20, 64])  # padded; read where they lie
def test_few_queries_find_what_many_find(isa, dim, dtype):
    """Up to four rows are multiplied with the bank as it lies: bit for bit the same."""
    query, _, bank, _ = problem(9, 1700, dim, dtype=dtype)
    query[2, 1], query[3, 1] = torch.nan, torch.inf
    bank[500:600] = bank[:100]  # ties
    bank[3, 0], bank[77, 2] = torch.nan, torch.inf
    for count in (0, 1, 63, 300, 1500):
        for hidden in ({}, *exclusions(9, 1700, count)):
            wanted = bank_topk(query, bank, 9, count=count, backend="cpp", **hidden)
            for rows in (slice(0, 1), slice(1, 5), slice(6, 9)):
                few = {n: x if n == "bank_ids" else x[rows] for n, x in hidden.items()}
                got = bank_topk(query[rows], bank, 9, count=count, backend="cpp", **few)
                assert torch.equal(got[0], wanted[0][rows])
                assert torch.equal(got[1], wanted[1][rows])


def test_few_queries_give_the_same_on_any_number_of_threads(isa, threads):
    query, _, bank, _ = problem(3, 70000, 64)
    bank[40000:] = bank[:30000]  # ties in other chunks
    threads(1)
    want = bank_topk(query, bank, 20, backend="cpp")
    for count in (2, 3, 8):
        threads(count)
        got = bank_topk(query, bank, 20, backend="cpp")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_every_half_is_read_as_what_it_is(isa, monkeypatch):
    monkeypatch.setenv("PSM_CPU_ISA", isa)
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    halves = halves[~halves.isnan()]
    bank = torch.zeros(len(halves), 32, dtype=torch.float16)
    bank[:, 0] = halves
    got, want = (
        torch.cat([bank_topk(torch.eye(1, 32).half(), rows, 512, backend=b)[0] for rows in
                   bank.split(512)], 1) for b in ("cpp", "reference")
    )  # fmt: skip
    assert torch.equal(got, want)


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
    queue.put([t.tolist() for t in step(*args)])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_a_forked_child_computes_the_same(threads, tmp_path):
    threads(2)
    args = pairs(64, 20000, 64)
    want = [t.tolist() for t in step(*args)]
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


COUNT = torch.tensor(1 << 40)  # clamped to the slots


def pass_args(change):
    """PassArgs that pass the checks and are never run; `change` as {"bank.dim": 3}."""
    names = "query key s_pos affine rho neg_lse neg_mean neg_sq_lse neg_count"
    args = _C.PassArgs(
        options=_C.PassOptions(temperature=0.5, selection=0, topk=2, exclude_mined=True),
        bank=_C.Bank(rows=4096, slots=10, dim=8, count=COUNT.data_ptr()),
        exclude=_C.Exclude(slots=4096, listed=3, ids=4096, bank_ids=4096),
        batch=4,
        rng_state=RNG_STATE.data_ptr(),
        **dict.fromkeys([*names.split(), "topk_sim", "topk_index"], 4096),
    )
    return changed(args, change)


def changed(args, change):
    for path, value in change.items():
        struct, _, field = path.rpartition(".")
        part = getattr(args, struct) if struct else args
        setattr(part, field, value)
        if struct:
            setattr(args, struct, part)
    return args


def workspace(batch, slots, dim, topk) -> int:
    sizes = {"batch": batch, "bank.slots": slots, "bank.dim": dim, "options.topk": topk}
    return _C.workspace_bytes(pass_args(sizes), ISAS[0], 2)


def test_extra_memory_does_not_grow_with_the_bank():
    million = workspace(256, 1 << 20, 128, 5)
    assert million < 64e6
    assert workspace(256, 1 << 24, 128, 5) == million
    assert workspace(256, 1 << 20, 4096, 64) < 100e6


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": 0}, "key: got a null pointer"),
        ({"bank.rows": 0}, "bank: got a null pointer"),
        ({"bank.count": 0}, "count: got a null pointer"),
        ({"neg_lse": 0}, "neg_lse: got a null pointer"),
        ({"s_pos": 0}, "s_pos: got a null pointer"),
        ({"rng_state": 0}, "rng_state: got a null pointer"),
        ({"query": 4097}, "query: got address 4097, wanted a multiple of 4"),
        ({"bank.rows": 4097, "bank.dtype": 1}, "bank: got address 4097, wanted a multiple of 2"),
        ({"topk_index": 4100}, "topk_index: got address 4100, wanted a multiple of 8"),
        ({"batch": -1}, "batch: got -1"),
        ({"bank.slots": -1}, "slots: got -1"),
        ({"bank.slots": 1 << 32}, "slots: got 4294967296"),
        ({"bank.dim": 0}, "dim: got 0"),
        ({"bank.dim": 4097}, "dim: got 4097"),
        ({"options.topk": -1}, "topk: got -1"),
        ({"batch": 1 << 62}, "batch: got"),
        ({"bank.dtype": 3}, "dtype: got 3"),
        ({"options.selection": 4}, "selection: got 4"),
        ({"options.selection": 3, "rho": 0}, "rho: got a null pointer"),
        ({"options.selection": 3, "affine": 0}, "affine: got a null pointer"),
        ({"exclude.slots": 0}, "exclude: got a null pointer"),
        ({"exclude.slots": 4100}, "exclude: got address 4100, wanted a multiple of 8"),
        ({"exclude.listed": -1}, "listed: got -1"),
        ({"exclude.ids": 0}, "ids: got a null pointer"),
        ({"exclude.bank_ids": 0}, "bank_ids: got a null pointer"),
        ({"options.temperature": 0.0}, "temperature: got 0"),
        ({"options.temperature": float("nan")}, "temperature: got"),
    ],
)
def test_bindings_refuse_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        _C.bank_pass(pass_args(change), ISAS[0], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": 0}, "key: got a null pointer"),
        ({"query": 4097}, "query: got address 4097, wanted a multiple of 4"),
        ({"gradient": 0}, "gradient: got a null pointer"),
        ({"soft_weights": 3}, "soft_weights: got 3"),
        ({"weight_temperature": 0.0}, "weight_temperature: got 0"),
        ({"pass_": pass_args({"options.selection": 3})}, "selection: got 3"),
        ({"pass_": pass_args({"batch": -1})}, "batch: got -1"),
    ],
)
def test_a_step_refuses_bad_arguments(change, message):
    addresses = dict.fromkeys(("query", "key", "loss", "gradient"), 4096)
    args = changed(_C.StepArgs(pass_=pass_args({}), **addresses), change)
    with pytest.raises(ValueError, match=f"^{message}"):
        _C.psm_step(args, ISAS[0], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": -1}, "batch: got -1"),
        ({"key_dtype": 3}, "key_dtype: got 3"),
        ({"keys": 0}, "keys: got a null pointer"),
        ({"keys": 4098}, "keys: got address 4098"),
        ({"labels": 4100}, "labels: got address 4100"),
        ({"bank_labels": 0}, "bank_labels: got a null pointer"),
        ({"bank_ids": 0}, "bank_ids: got a null pointer"),
        ({"ptr": 0}, "ptr: got a null pointer"),
        ({"bank": _C.Bank(rows=4096, slots=0, dim=8, count=4096)}, "slots: got 0"),
        ({"bank": _C.Bank(rows=4096, slots=9, dim=8)}, "count: got a null pointer"),
    ],
)
def test_an_enqueue_refuses_bad_arguments(change, message):
    bank = _C.Bank(rows=4096, slots=9, dim=8, count=4096)
    addresses = dict.fromkeys(("keys", "bank_labels", "bank_ids", "ptr"), 4096)
    args = changed(_C.EnqueueArgs(bank=bank, batch=1, **addresses), change)
    with pytest.raises(ValueError, match=f"^{message}"):
        _C.enqueue(args, ISAS[0], 2)


def test_threads_and_instruction_set_are_checked():
    with pytest.raises(ValueError, match=r"^threads: got 0"):
        _C.bank_pass(pass_args({}), ISAS[0], 0)
    with pytest.raises(ValueError, match=r"^isa: got 'sse9'"):
        _C.bank_pass(pass_args({}), "sse9", 2)


def test_a_struct_refuses_what_is_not_its_field():
    with pytest.raises(TypeError, match=r"there is no field 'depth'"):
        _C.Bank(depth=3)
    with pytest.raises(TypeError, match=r"dim: got 2\.5"):
        _C.Bank(dim=2.5)
    name = "".join(["d", "im"])  # not the same object as the name in the module
    assert _C.Bank(**{name: 7}).dim == 7


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("PSM_CPU_ISA", "avx9")
    with pytest.raises(ValueError, match="PSM_CPU_ISA: got 'avx9', wanted one"):
        large_pass()


# --- what the processor does fast ----------------------------------------------------------------


@pytest.mark.skipif("avx512_bf16" not in ISAS, reason="nothing to choose between")
@pytest.mark.parametrize(
    ("vendor", "family", "model", "isa"),
    [
        ("AuthenticAMD", 25, 0x11, "avx512_bf16"),
        ("AuthenticAMD", 26, 0x02, "avx512_bf16"),
        ("GenuineIntel", 6, 0x8F, "avx512_vnni"),
        ("GenuineIntel", 6, 0xCF, "avx512_vnni"),
    ],
)
def test_the_table_of_processors(vendor, family, model, isa):
    chosen = _C.choose_for(vendor, family, model)
    assert chosen.isa == isa
    assert chosen.why.startswith({"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}[vendor])


def test_a_processor_that_is_not_in_the_table_is_measured():
    chosen = _C.choose_for("VendorOfTests", 1, 2)
    measured = ISAS[:-1]  # not portable, which nothing is slower than
    if len(measured) > 1:
        assert chosen.isa in measured
        assert chosen.why.startswith("measured: ")
        assert all(f" {isa} " in chosen.why for isa in measured)
    else:
        assert (chosen.isa, chosen.why) == (ISAS[0], "the best that it runs")


def kernels_say(**environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "psm_kernels"]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_the_command_prints_what_is_used(monkeypatch):
    monkeypatch.delenv("PSM_CPU_ISA", raising=False)
    chosen = _C.processor()
    said = re.search(r"\ncpp: (\w+) \((.+)\): bf16 banks by ", kernels_say().stdout)
    if chosen.why.startswith("measured"):  # two processes need not measure the same
        assert said[1] in _C.instruction_sets()
        assert said[2].startswith(f"measured: {_C.instruction_sets()[0]} ")
    else:
        assert said.groups() == (chosen.isa, chosen.why)
    forced = kernels_say(PSM_CPU_ISA="portable", PSM_CPU_L2_KB="256").stdout
    line = "cpp: portable (set by PSM_CPU_ISA): bf16 banks by fp32 after conversion, mining by fp32"
    assert f"\n{line}, tiles for 256 KB of L2\n" in forced


def test_products_follow_the_instruction_set(isa):
    dot, quads = isa == "avx512_bf16", isa in ("avx512_vnni", "avx512_bf16")
    product = "the bf16 dot product" if dot else "fp32 after conversion"
    assert _C.products(isa) == f"bf16 banks by {product}, mining by {'bytes' if quads else 'fp32'}"


@pytest.mark.parametrize("kb", ["", "0", "127", "65537", "1e3", "2 MB"])
def test_a_wrong_size_of_the_cache_is_refused(kb):
    refusal = kernels_say(PSM_CPU_L2_KB=kb)
    assert refusal.returncode != 0
    assert f"ValueError: PSM_CPU_L2_KB: got '{kb}', wanted a number from" in refusal.stderr


OTHER_TILES = """
import torch
from psm_kernels import _C
from psm_kernels.functional import psm_loss
g = torch.Generator().manual_seed(0)
for dim in (40, 128, 300, 1100):
    query, key, bank = (torch.randn(n, dim, generator=g) for n in (70, 70, 3000))
    settings = {"temperature": 0.2, "topk": 5, "rng_state": torch.tensor([1, 2])}
    bank = torch.nn.functional.normalize(bank)
    got, want = (psm_loss(query, key, bank, backend=b, **settings) for b in ("cpp", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize("kb", [128, 512, 4096])
def test_tiles_for_other_caches_give_the_same(kb):
    environment = {**os.environ, "PSM_CPU_L2_KB": str(kb)}
    subprocess.run([sys.executable, "-c", OTHER_TILES], check=True, cwd=ROOT, env=environment)


# --- build ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sources", [True, False], ids=["checkout", "wheel"])
def test_a_module_of_other_sources_is_refused(monkeypatch, tmp_path, sources):
    """A checkout knows it by the sources next to the package, a wheel by the version."""
    (tmp_path / "csrc").mkdir()  # of another project
    if sources:
        (tmp_path / "csrc/args.h").write_text("struct Bank;")
    wanted = source_id(tmp_path / "psm_kernels", __version__)
    assert ("+" in wanted) == sources
    monkeypatch.setattr(compiled, "source_id", lambda package, version: wanted)
    for built, fits in [
        (wanted, True),
        (f"{__version__}+0000000000000000", not sources),
        ("0.0.1", False),
        ("0.0.1+0000000000000000", False),
    ]:
        monkeypatch.setattr(_C, "source_id", built)
        reason = compiled.unavailable.__wrapped__()
        assert (reason is None) == fits
        if not fits:
            assert "built from other sources" in reason
            assert "pip install -e ." in reason
