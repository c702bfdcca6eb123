"""The cuda backend run on the CPU: the real module and launches, the PTX that nvcc makes of
csrc/cuda, an instruction at a time (tests/ptx).

It checks layouts, descriptors, swizzles, barriers, waits, bounds, masks, noise, merge and launch,
and knows nothing of time, of ptxas, or of what a GPU does at once: for those see test_cuda.py.
"""

import math
import re
import struct

import cold
import numpy as np
import pytest
import torch
from conftest import problem
from ptx import machine, runtime, text

from psm_kernels import noise
from psm_kernels.backends.base import EMPTY, NOTHING, BankPass, Exclude
from psm_kernels.backends.cuda import Cuda
from psm_kernels.backends.reference import Reference
from psm_kernels.bank.memory_bank import MemoryBank
from psm_kernels.functional import psm_loss
from psm_kernels.options import PassOptions, PSMOptions
from psm_kernels.weighted import weighted_pass

pytestmark = pytest.mark.skipif(
    runtime.unavailable() is not None, reason=str(runtime.unavailable())
)

LOW = [torch.float32, torch.bfloat16, torch.float16]
# P in the second product has the bank's dtype: a rounding of 2^-9 per weight in bf16.
MEAN_ATOL = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}
PATHS = [
    pytest.param(path, dtype, id=f"{path}-{str(dtype)[6:]}")
    for path in ("sm80", "sm90")
    for dtype in LOW
    if (path, dtype) != ("sm90", torch.float32)
]
CAPABILITY = {"sm80": 8, "sm90": 9}
SEED, OFFSET = 0x1234567_89ABCDEF, 3 << 33 | 5
STATE = torch.tensor([SEED, OFFSET])
CELLS = 244  # where KernelArgs has its cells
CUDA, REFERENCE = Cuda(), Reference()


@pytest.fixture
def gpu(monkeypatch) -> runtime.Gpu:
    return runtime.Gpu(monkeypatch)


def arguments(query, key, bank, s_pos, count=None, exclude=NOTHING, **settings):
    options = PassOptions(
        **{"temperature": 0.2, "selection": "bernoulli", "a": 2.0, "b": -0.1, "topk": 5, **settings}
    )
    count = torch.tensor(len(bank) if count is None else count)
    key = key.to(bank.dtype) if options.topk else None
    return query.to(bank.dtype), key, bank, count, s_pos, options, exclude, STATE


def widened(args) -> list:
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]


def both(gpu, problem, path, cut=1, cell_log2=0, **settings) -> tuple[BankPass, BankPass]:
    """The kernels with `cut` multiprocessors to divide the work among, and the reference in
    float64 on the same rounded inputs."""
    args = arguments(*problem, **settings)
    gpu.capability, gpu.multiprocessors = CAPABILITY[path], cut
    return Cuda(cell_log2=cell_log2).bank_pass(*args), REFERENCE.bank_pass(*widened(args))


def assert_agree(got: BankPass, want: BankPass, dtype):
    def close(name, **tolerance):
        a, b = getattr(got, name).double(), getattr(want, name).double()
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m: f"{name}: {m}")

    close("neg_count", atol=1e-3, rtol=1e-5)
    close("neg_lse", atol=1e-5, rtol=1e-5)
    close("neg_sq_lse", atol=2e-5, rtol=1e-5)
    close("neg_mean", atol=MEAN_ATOL[dtype], rtol=1e-4)
    close("topk_sim", atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize(
    ("batch", "size", "dim", "topk", "cut", "cell_log2"),
    [
        (1, 1, 8, 1, 1, 0),
        (3, 63, 24, 5, 2, 0),
        (3, 700, 64, 20, 4, 0),
        (130, 150, 128, 0, 1, 0),
        (5, 530, 200, 5, 3, 7),
        (2, 270, 256, 300, 1, 0),
        (20, 97, 72, 7, 7, 8),
    ],
)
def test_odd_sizes(gpu, path, dtype, batch, size, dim, topk, cut, cell_log2, selection):
    count = max(1, size - size // 3)
    query, key, bank, s_pos = problem(batch, size, dim, dtype=dtype)
    bank[count:] = torch.nan
    settings = {"count": count, "selection": selection, "topk": topk, "cell_log2": cell_log2}
    got, want = both(gpu, (query, key, bank, s_pos), path, cut, **settings)
    assert_agree(got, want, dtype)
    assert torch.equal(got.topk_index >= 0, want.topk_index >= 0)
    if path == "sm90":
        assert "sm90" in gpu.launches[0]


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_it_does_not_matter_when_asynchronous_work_is_done(gpu, path, dtype):
    """At once here, as late as the program allows in all other tests, which have teams of warps."""
    gpu.early, gpu.warps = True, 1
    query, key, bank, s_pos = problem(3, 420, 128, dtype=dtype)
    got, want = both(gpu, (query, key, bank, s_pos), path, 2, count=400)
    assert_agree(got, want, dtype)
    _, index = CUDA.bank_topk(key.to(dtype), bank, 9, torch.tensor(400))
    want = REFERENCE.bank_topk(key.to(dtype).double(), bank.double(), 9, torch.tensor(400))
    assert torch.equal(index, want[1])


@pytest.mark.parametrize("path", ["sm80", "sm90"])
@pytest.mark.parametrize(("size", "dim"), [(1700, 64), (1200, 128), (500, 256)])
def test_the_ring_of_stages_goes_round(gpu, path, size, dim):
    """Twice, and for two blocks of rows that one block of threads takes after each other."""
    got, want = both(gpu, problem(130, size, dim, dtype=torch.bfloat16), path, topk=0)
    assert_agree(got, want, torch.bfloat16)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dim", [1, 20, 33, 250])
def test_rows_that_are_not_aligned(gpu, dtype, dim):
    got, want = both(gpu, problem(3, 140, dim, dtype=dtype), "sm90")
    assert_agree(got, want, dtype)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_exact_products_give_the_same_masks_and_indices(gpu, path, dtype):
    query, key, bank, s_pos = problem(9, 1500, 64, dtype=dtype, few_bits=True)
    bank[700:720] = bank[10:30]  # duplicates: ties go to the smaller slot
    for a in (0.0, 8.0, 1e30):
        got, want = both(gpu, (query, key, bank, s_pos), path, a=a, b=0.0, topk=20)
        assert torch.equal(got.neg_count, want.neg_count.float())
        assert torch.equal(got.topk_index, want.topk_index)
        assert torch.equal(got.topk_sim, want.topk_sim.float())


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_masks_do_not_depend_on_how_the_bank_is_cut(gpu, path, dtype):
    """A shard that starts anywhere has the noise of its global slots."""
    query, key, bank, s_pos = problem(4, 400, 64, dtype=dtype, few_bits=True)
    whole = both(gpu, (query, key, bank, s_pos), path, row_offset=7)[0]
    counts = torch.zeros(4)
    for start, end in ((0, 37), (37, 150), (150, 400)):
        shard = bank[start:end].contiguous()
        got, want = both(gpu, (query, key, shard, s_pos), path, row_offset=7, col_offset=start)
        assert torch.equal(got.topk_index, want.topk_index)
        counts += got.neg_count
    assert torch.equal(counts, whole.neg_count)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_the_cut_of_the_work_changes_nothing_but_rounding(gpu, path, dtype):
    one = both(gpu, problem(20, 500, 64, dtype=dtype), path)[0]
    for cut in (2, 5, 40):
        other = both(gpu, problem(20, 500, 64, dtype=dtype), path, cut)[0]
        assert torch.equal(one.topk_index, other.topk_index)
        assert torch.equal(one.topk_sim, other.topk_sim)
        assert torch.equal(one.neg_count, other.neg_count)
        torch.testing.assert_close(one.neg_lse, other.neg_lse, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_cold_temperature_with_equal_similarities(gpu, path, dtype, sign):
    row = torch.full((16,), 0.25)
    query, bank = row.expand(3, 16).clone(), (sign * row).expand(500, 16).contiguous().to(dtype)
    cold = {"temperature": 0.02, "selection": "all"}
    got, _ = both(gpu, (query, query, bank, torch.ones(3)), path, **cold)
    assert got.neg_lse.tolist() == pytest.approx([sign * 50 + math.log(500)] * 3, rel=1e-6)
    assert got.neg_sq_lse.tolist() == pytest.approx([sign * 100 + math.log(500)] * 3, rel=1e-6)
    torch.testing.assert_close(got.neg_mean, bank[:3].float(), atol=1e-3, rtol=1e-3)
    assert got.topk_index.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("selection", ["bernoulli", "expected"])
def test_what_is_kept_may_be_far_below_the_largest_logit(gpu, path, dtype, selection):
    """exp(-1/0.01) beside exp(1/0.01): only the kept one may set the shift."""
    row = torch.zeros(64)
    row[0] = 1.0
    signs = torch.where(torch.arange(600) % 3 == 0, 1.0, -1.0)
    bank = (signs[:, None] * row).to(dtype)
    got, want = both(
        gpu,
        (row[None], row[None], bank, torch.ones(1)),
        path,
        temperature=0.01,
        a=500.0,
        b=-2.0,  # the peak is at s = -1
        selection=selection,
    )
    assert_agree(got, want, dtype)
    assert got.neg_lse.item() == pytest.approx(-100 + math.log(400), abs=0.2)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_growing_logits_move_the_shift(gpu, path, dtype):
    row = torch.zeros(64)
    row[0] = 1.0
    bank = (torch.linspace(-1, 1, 1000)[:, None] * row).to(dtype)
    problem = (row.repeat(2, 1), row.repeat(2, 1), bank, torch.ones(2))
    got, want = both(gpu, problem, path, temperature=0.01, selection="all")
    assert_agree(got, want, dtype)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_spoils_itself_alone(gpu, path, dtype, bad):
    query, key, bank, s_pos = problem(20, 300, 64, dtype=dtype)
    good = both(gpu, (query, key, bank, s_pos), path)[0]
    query, key = query.clone(), key.clone()
    query[3, 5], key[6, 7] = bad, bad
    got = both(gpu, (query, key, bank, s_pos), path)[0]
    assert got.neg_lse[3].isnan()
    assert got.neg_mean[3].isnan().all()
    assert ((got.topk_index >= -1) & (got.topk_index < 300)).all()
    other = torch.tensor([row for row in range(20) if row not in (3, 6)])
    for a, b in zip(got, good, strict=True):
        assert torch.equal(a[other], b[other])


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_an_empty_bank(gpu, path, dtype):
    query, key, bank, s_pos = problem(3, 40, 64, dtype=dtype)
    got, _ = both(gpu, (query, key, torch.full_like(bank, torch.nan), s_pos), path, count=0)
    assert (got.neg_lse == -math.inf).all()
    assert (got.neg_sq_lse == -math.inf).all()
    assert not got.neg_mean.any()
    assert not got.neg_count.any()
    assert (got.topk_sim == -math.inf).all()
    assert (got.topk_index == -1).all()


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize(
    ("size", "dim", "k", "cut", "cell_log2"),
    [(300, 504, 7, 2, 0), (90, 64, 200, 1, 0), (1300, 40, 20, 3, 3), (900, 128, 5, 2, 8)],
)
def test_bank_topk(gpu, path, dtype, size, dim, k, cut, cell_log2):
    _, key, bank, _ = problem(5, size, dim, dtype=dtype)
    bank[size - 10 :] = torch.nan
    gpu.capability, gpu.multiprocessors = CAPABILITY[path], cut
    key, count = key.to(dtype), torch.tensor(size - 10)
    sim, index = Cuda(cell_log2=cell_log2).bank_topk(key, bank, k, count)
    want_sim, want_index = REFERENCE.bank_topk(key.double(), bank.double(), k, count)
    torch.testing.assert_close(sim.double(), want_sim, atol=1e-6, rtol=1e-5)
    assert (index == want_index).float().mean() > 0.99


def test_bank_topk_of_odd_widths(gpu):
    _, key, bank, _ = problem(5, 257, 33, dtype=torch.bfloat16)
    key, count = key.bfloat16(), torch.tensor(257)
    sim, _ = CUDA.bank_topk(key, bank, 20, count)
    want = REFERENCE.bank_topk(key.double(), bank.double(), 20, count)
    torch.testing.assert_close(sim.double(), want[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("cell_log2", [2, 3, 6, 7])
def test_bank_topk_gives_ties_to_the_smaller_slot(gpu, path, dtype, cell_log2):
    """Most slots tie, so that the last cells chosen matter; few bits: all products are exact."""
    _, key, bank, _ = problem(4, 700, 64, dtype=dtype, few_bits=True)
    bank[:] = bank[torch.arange(700) * 7 % 9]
    gpu.capability, gpu.multiprocessors = CAPABILITY[path], 2
    key, count = key.to(dtype), torch.tensor(700)
    for k in (1, 3, 6, 50):
        _, index = Cuda(cell_log2=cell_log2).bank_topk(key, bank, k, count)
        want = REFERENCE.bank_topk(key.double(), bank.double(), k, count)[1]
        assert torch.equal(index, want)


@pytest.mark.parametrize(
    ("slots", "dim", "k", "group", "log2"),
    [
        (50_000, 512, 5, 4, 3),
        (50_000, 512, 200, 4, 2),
        (100, 512, 200, 4, 2),
        (65_536, 128, 5, 1, 6),
        (2**20, 128, 5, 1, 6),
        (2**20 + 1, 128, 5, 1, 7),
        (2**31 - 4096, 64, 1, 4, 17),
    ],
)
def test_the_size_of_cells(gpu, slots, dim, k, group, log2):
    """From the arguments of a launch that is not run."""
    gpu.capability, gpu.runs = 9 if group > 1 else 8, False
    gpu.place(None)
    kernels, at = runtime.module(), 4096
    args = kernels.PassArgs(
        options=kernels.PassOptions(selection=2, topk=k), batch=1, key=at,
        bank=kernels.Bank(rows=at, slots=slots, dim=dim, dtype=1, count=at),
        topk_sim=at, topk_index=at,
    )  # fmt: skip
    kernels.cuda.bank_pass(args, device=0, stream=0, workspace=at)
    planned_log2, planned_group, room = struct.unpack_from("3i", gpu.values[0], CELLS)
    assert (planned_log2, planned_group) == (log2, group)
    assert room << log2 >= slots
    assert room % group == 0
    assert room <= 2**14 + 256


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_a_bad_slot_hides_no_other(gpu, path, dtype):
    """As an integer, NaN is the largest of all; the cell maxima must not take it."""
    query, key, bank, s_pos = problem(4, 300, 64, dtype=dtype, few_bits=True)
    bank[70], bank[75] = torch.nan, torch.inf
    got, _ = both(gpu, (query, key, bank, s_pos), path, topk=300)
    good = torch.tensor([slot for slot in range(300) if slot not in (70, 75)])
    for row in got.topk_index:
        assert torch.isin(good, row).all()


def hidden(batch: int, size: int, count: int, *, lists=True, ids=True) -> Exclude:
    """Slots twice, behind `count`, outside the bank; any number of copies of an id; empty slots."""
    random = torch.Generator().manual_seed(batch)
    slots = torch.randint(-3, size + 3, (batch, 7), generator=random)
    slots[:, 3] = slots[:, 5]
    slots[0] = 2**40
    bank_ids = torch.randint(-1, 2 * batch, (size,), generator=random)
    bank_ids[size // 3 : size // 2] = torch.arange(size // 3, size // 2) % 2  # copies of 0 and 1
    bank_ids[::17] = EMPTY
    named = torch.arange(batch) // 2  # two rows of one id
    named[1::4] = EMPTY
    return Exclude(slots if lists else None, *((named, bank_ids) if ids else (None, None)))


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("kind", ["lists", "ids", "both", "mined", "both and mined"])
def test_what_is_hidden_is_neither_mined_nor_summed(gpu, path, dtype, selection, kind):
    batch, size, count = 19, 700, 680
    query, key, bank, s_pos = problem(batch, size, 64, dtype=dtype)
    bank[count:] = torch.nan
    exclude = hidden(batch, size, count, lists=kind != "ids", ids=kind != "lists")
    settings = {
        "count": count,
        "selection": selection,
        "exclude": NOTHING if kind == "mined" else exclude,
        "exclude_mined": "mined" in kind,
        "col_offset": 21,
    }
    got, want = both(gpu, (query, key, bank, s_pos), path, 2, **settings)
    assert_agree(got, want, dtype)
    assert torch.equal(got.topk_index, want.topk_index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [20, 128, 256])
@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_hidden_slots_at_every_width(gpu, dtype, dim, path):
    exclude = hidden(70, 300, 290)
    settings = {"count": 290, "exclude": exclude, "exclude_mined": True, "topk": 20}
    got, want = both(gpu, problem(70, 300, dim, dtype=dtype), path, **settings)
    assert_agree(got, want, dtype)
    assert (got.topk_index == want.topk_index).float().mean() > 0.99


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_rows_that_see_nothing(gpu, path, dtype):
    """All slots hold their id, or none."""
    query, key, bank, s_pos = problem(5, 150, 20, dtype=dtype)
    bank_ids = torch.full((150,), 3)
    bank_ids[::2] = EMPTY
    exclude = Exclude(None, torch.tensor([3, EMPTY, 3, 4, 3]), bank_ids)
    got, want = both(gpu, (query, key, bank, s_pos), path, exclude=exclude, selection="all")
    assert got.neg_count.tolist() == [0, 75, 0, 75, 0]
    assert (got.neg_lse[[0, 2, 4]] == -math.inf).all()
    assert (got.topk_index[[0, 2, 4]] == -1).all()
    assert torch.equal(got.topk_index, want.topk_index)


@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_flags_of_a_long_bank(gpu, path):
    """Words of flags are looked for by 32 lanes, each 2,048 slots on."""
    query, key, bank, s_pos = problem(2, 70_000, 8, dtype=torch.bfloat16)
    slots = torch.tensor([[5, 69_999, 40_000], [2_047, 2_048, 66_000]])
    nearest = key[1].bfloat16().float() @ bank.float().T
    slots[1, 2] = nearest.argmax()
    settings = {"exclude": Exclude(slots), "selection": "all", "topk": 3, "exclude_mined": True}
    got, want = both(gpu, (query, key, bank, s_pos), path, **settings)
    assert_agree(got, want, torch.bfloat16)
    assert torch.equal(got.topk_index, want.topk_index)
    assert got.neg_count.tolist() == [70_000 - 6] * 2


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("temperature", [0.05, 0.02])
def test_cold_temperatures(gpu, path, dtype, selection, temperature):
    """Mined rows hold exp(0.4/0.02) = 5e8 times what is left: no sum may hold them."""
    p, settings = cold.problem(size=230), {"selection": selection, "temperature": temperature}
    got = step(gpu, path, *p[:2], p.bank.to(dtype), count=230, state=cold.RNG_STATE, **settings)
    cold.assert_step(got, cold.answer(p, **settings), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "dim", "count"), [(3, 63, 24, 40), (70, 300, 128, 300), (2, 130, 250, 0)]
)
@pytest.mark.parametrize("hides", [False, True])
def test_weighted_pass(gpu, hides, batch, size, dim, count, dtype):
    query, _, bank, _ = problem(batch, size, dim, dtype=dtype)
    random = torch.Generator().manual_seed(1)
    rows = {name: torch.rand(batch, generator=random) - 0.3 for name in ("alpha", "beta", "gamma")}
    query = query.to(dtype).float()
    rows["top"] = (query @ bank.float().T).max(1).values
    rows["cap"] = torch.full((batch,), 0.2)
    rho = torch.rand(size, generator=random) - 0.5
    exclude = hidden(batch, size, count) if hides else NOTHING
    want = weighted_pass(
        query.double(),
        bank.double(),
        count,
        temperature=0.3,
        **{name: value.double() for name, value in rows.items()},
        rho=rho.double(),
        exclude=exclude,
        backend="reference",
    )
    bank[count:], rho[count:] = torch.nan, torch.nan
    affine = torch.stack(tuple(rows.values()))
    args = (query.to(dtype), bank, torch.tensor(count), 0.3, affine, rho, exclude)
    log_sum, mean, weight = CUDA.weighted_pass(*args)
    torch.testing.assert_close(log_sum.double(), want.log_sum, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight.double(), want.weight, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mean.double(), want.mean, atol=MEAN_ATOL[dtype], rtol=1e-4)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize(
    ("row_offset", "col_offset"), [(0, 0), (2**32 - 3, 16 * (2**27 - 1)), (11, 2**33)]
)
def test_the_noise_is_the_canonical_one(gpu, path, dtype, row_offset, col_offset):
    """A bank of unit vectors: the mean of what is kept is the mask itself."""
    bank, query = torch.eye(64).to(dtype), torch.full((19, 64), 0.125)
    settings = {"row_offset": row_offset, "col_offset": col_offset, "topk": 0}
    got, _ = both(gpu, (query, query, bank, torch.zeros(19)), path, a=44.0, b=0.0, **settings)
    words = noise.philox_block(row_offset, 19, 64, col_offset, STATE)
    assert torch.equal(got.neg_mean > 0, words < math.exp(-44.0 / 64) * 2**32)


@pytest.mark.parametrize("key_dtype", LOW, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_enqueue(gpu, key_dtype, dtype):
    want = MemoryBank(10, 20, dtype=dtype)
    got = MemoryBank(10, 20, dtype=dtype)
    bank_ids, named = torch.full((2, 10), -1)
    for batch in (3, 4, 1, 10, 23, 5):
        keys = torch.randn(batch, 20).to(key_dtype)
        if batch > 4:
            keys[1], keys[2, 3], keys[3, 0] = 0.0, math.nan, math.inf
        labels = torch.arange(batch) if batch != 4 else None
        ids = labels + 100 if batch % 2 else None
        slots = torch.arange(int(got.ptr), int(got.ptr) + batch)[-10:] % 10
        named[slots] = -1 if ids is None else ids[-10:]
        want.enqueue(keys, labels)
        CUDA.enqueue(keys, labels, ids, got.bank, got.labels, bank_ids, got.ptr, got.count)
        assert torch.equal(bank_ids, named)
        assert torch.equal(got.ptr, want.ptr)
        assert torch.equal(got.count, want.count)
        assert torch.equal(got.labels, want.labels)
        torch.testing.assert_close(got.bank, want.bank, atol=0, rtol=2.0**-8)


def step(
    gpu, path, query, key, bank, *, count, exclude=NOTHING, row_offset=0, state=STATE, **settings
):
    gpu.capability, gpu.multiprocessors = CAPABILITY[path], 2
    options = PSMOptions(**settings)
    return CUDA.psm_step(query, key, bank, torch.tensor(count), options, exclude, state, row_offset)


def step_in_float64(query, key, bank, *, count, exclude=NOTHING, row_offset=0, **settings):
    """psm_loss and its gradient by `query`, of the rounded rows that the kernels sum over."""
    leaf = query.double().requires_grad_()
    loss = psm_loss(
        leaf, key.double(), bank.double(), count=count, rng_state=STATE,
        row_offset=row_offset, ids=exclude.ids, bank_ids=exclude.bank_ids,
        reduction="none", backend="reference", **settings,
    )  # fmt: skip
    loss.sum().backward()
    return loss.detach(), leaf.grad


def exact_rows(batch, size, dim=64, *, dtype, seed=0):
    """Rows of any power of two in length whose unit rows are exact in every dtype: only then do
    the kernels, which round, and float64 sample the same."""
    query, key, bank, _ = problem(batch, size, dim, dtype=dtype, few_bits=True, seed=seed)
    return query * 4.0, key / 2.0, bank


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("soft_weights", ["attention", "uniform", "binary"])
@pytest.mark.parametrize(("size", "topk"), [(60, 5), (3, 5), (60, 0), (0, 5)])
def test_psm_step(gpu, size, topk, soft_weights, selection, path, dtype):
    query, key, bank = exact_rows(4, max(size, 10), dtype=dtype)
    settings = {
        "temperature": 0.3, "selection": selection, "a": 2.0, "b": -0.1, "row_offset": 3,
        "soft_weights": soft_weights, "weight_temperature": 0.7, "hard_weight": 0.6,
        "topk": topk, "count": size,
    }  # fmt: skip
    got = step(gpu, path, query, key, bank, **settings)
    want = step_in_float64(query, key, bank, **settings)
    cold.assert_step(got, want, dtype)
    known = ("unit_kernel", "mined_kernel", "merge_kernel", "loss_kernel")
    stages = [name for launch in gpu.launches for name in known if name in launch]
    assert stages == [name for name in known if topk or name != "mined_kernel"]


@pytest.mark.parametrize("dim", [20, 64, 250])
@pytest.mark.parametrize("scale", [1e30, 1.0, 1e-30])
def test_psm_step_of_rows_of_any_length(gpu, scale, dim):
    """Their squares are not fp32 numbers."""
    query, key, bank, _ = problem(3, 90, dim)
    settings = {"temperature": 0.2, "selection": "all", "count": 90}
    got = step(gpu, "sm80", query * scale, key * scale, bank, **settings)
    want = step_in_float64(query, key, bank, **settings)
    torch.testing.assert_close(got[0].double(), want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1].double() * scale, want[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_psm_step_of_rows_of_zeros(gpu, path, dtype):
    """Of numbers below the normal ones as well: a row stays as it is, and so does its gradient."""
    query, key, bank, _ = problem(4, 90, 64, dtype=dtype)
    query[1], query[2], key[3] = 0.0, 1e-40, 0.0
    settings = {"temperature": 0.2, "selection": "all", "count": 90}
    loss, gradient = step(gpu, path, query, key, bank, **settings)
    want = step_in_float64(query.where(query.abs() > 1e-39, 0.0), key, bank, **settings)
    torch.testing.assert_close(loss.double(), want[0], atol=1e-3, rtol=1e-3)
    assert gradient.isfinite().all()
    rows = torch.tensor([0, 3])
    torch.testing.assert_close(gradient[rows].double(), want[1][rows], atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_a_bad_row_spoils_its_own_step_alone(gpu, path, dtype):
    query, key, bank = exact_rows(5, 90, dtype=dtype)
    settings = {"temperature": 0.2, "count": 90}
    good = step(gpu, path, query, key, bank, **settings)
    query[1, 3], key[2, 4] = math.nan, math.inf
    loss, gradient = step(gpu, path, query, key, bank, **settings)
    others = torch.tensor([0, 3, 4])
    assert torch.equal(loss[others], good[0][others])
    assert torch.equal(gradient[others], good[1][others])
    assert loss[1:3].isnan().all()
    assert gradient[1:3].isnan().any(1).all()


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("topk", [0, 5])
def test_psm_step_sees_nothing_hidden(gpu, path, dtype, topk):
    query, key, bank = exact_rows(19, 200, dtype=dtype)
    settings = {
        "exclude": hidden(19, 200, 190, lists=False),
        "count": 190,
        "topk": topk,
        "temperature": 0.3,
    }
    got = step(gpu, path, query, key, bank, **settings)
    cold.assert_step(got, step_in_float64(query, key, bank, **settings), dtype)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("loss", [1e-2, 1e-6, 1e-30])
def test_small_losses_keep_their_digits(gpu, path, dtype, loss):
    """InfoNCE of a positive of similarity 1 and 16 negatives of 0.5, all of them the same row."""
    query, bank = torch.zeros(1, 64), torch.zeros(16, 64, dtype=dtype)
    query[0, 0], bank[:, 0], bank[:, 1] = 4.0, 0.5, 0.75**0.5
    tau = 0.5 / math.log(16 / loss)
    settings = {"temperature": tau, "topk": 0, "selection": "all", "hard_weight": 0.0}
    got, gradient = step(gpu, path, query, 3.0 * query, bank, count=16, **settings)
    assert got.item() == pytest.approx(math.log1p(loss), rel=1e-4)
    pull = loss / (1 + loss) / tau / 4.0  # of the part of the negatives across the query
    assert gradient[0, 1].item() == pytest.approx(pull * bank[0, 1].item(), rel=5e-3)
    assert gradient[0, 0].abs() < 5e-3 * pull


@pytest.mark.parametrize(
    ("source", "pattern", "message"),
    [
        ("sm90_bfloat16", r"wgmma\.wait_group\S* 0;", "asynchronous work"),
        ("sm90_bfloat16", r"wgmma\.commit_group[^;]*;", "asynchronous work"),
        ("sm90_bfloat16", r"fence\.proxy[^;]*;", "no fence.proxy.async"),
        ("sm90_bfloat16", r"mbarrier\.arrive\.shared[^;]*;", "every thread waits"),
        ("sm90_bfloat16", r"\.expect_tx(?=.*_,)", None),
        ("sm80_bfloat16", r"cp\.async\.wait_group[^;]*;", "asynchronous work"),
        ("sm80_bfloat16", r"\.trans(?=\.shared)", None),
        ("sm80_bfloat16", r"bar\.sync[^;]*;", None),
        ("launch", r"bar\.sync[^;]*;", None),
    ],
)
def test_the_machine_finds_faults(gpu, source, pattern, message):
    """What a kernel lacks shows in an error or, without a message, in its results."""
    broken, found = re.subn(pattern, "", runtime.texts()[source])
    assert found
    gpu.warps = 1
    gpu.replaced = {runtime.plain(k): v for k, v in text.read(broken).items()}
    sound = problem(3, 700, 128, dtype=torch.bfloat16)
    if message:
        with pytest.raises(RuntimeError, match=message):
            both(gpu, sound, source[:4])
    else:
        got, want = both(gpu, sound, "sm80" if source == "launch" else source[:4])
        with pytest.raises(AssertionError):
            assert_agree(got, want, torch.bfloat16)


def test_the_machine_checks_bounds_and_alignment():
    memory = machine.Memory(np.zeros(64, np.uint8), 0, [(0, 24), (32, 64)])
    assert memory.at(np.array([8, 40, 16]), 8).tolist() == [1, 5, 2]
    with pytest.raises(text.Fault, match="out of bounds"):
        memory.at(np.array([0, 24]), 8)
    with pytest.raises(text.Fault, match="misaligned"):
        memory.at(np.array([8]), 8, 2)
