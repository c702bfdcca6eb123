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

from psm_kernels import MemoryBank, functional, noise
from psm_kernels.ops import EMPTY, NOTHING, BankPass, Exclude, bank_pass, cuda, reference
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


@pytest.fixture
def gpu(monkeypatch) -> runtime.Gpu:
    return runtime.Gpu(monkeypatch)


def arguments(query, key, bank, s_pos, **settings):
    settings = {
        "count": len(bank),
        "temperature": 0.2,
        "selection": "bernoulli",
        "a": 2.0,
        "b": -0.1,
        "topk": 5,
        "rng_state": torch.tensor([SEED, OFFSET]),
        "row_offset": 0,
        "col_offset": 0,
        "exclude": NOTHING,
        "exclude_mined": False,
        **settings,
    }
    settings["count"] = torch.tensor(settings["count"])
    key = key.to(bank.dtype) if settings["topk"] else None
    count = settings.pop("count")
    return query.to(bank.dtype), key, bank, count, s_pos, *settings.values()


def widened(args) -> list:
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]


def both(gpu, problem, path, cut=1, **settings) -> tuple[BankPass, BankPass]:
    """The kernels with `cut` multiprocessors to divide the work among, and the reference in
    float64 on the same rounded inputs."""
    cell_log2 = settings.pop("cell_log2", 0)
    args = arguments(*problem, **settings)
    gpu.capability, gpu.multiprocessors = CAPABILITY[path], cut
    got = BankPass(*cuda.bank_pass(*args, cell_log2=cell_log2))
    return got, BankPass(*reference.bank_pass(*widened(args)))


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
    _, index = cuda.bank_topk(key.to(dtype), bank, 9, torch.tensor(400))
    want = reference.bank_topk(key.to(dtype).double(), bank.double(), 9, torch.tensor(400))
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
    """A shard that starts anywhere draws the noise of its global slots."""
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
    sim, index = cuda.bank_topk(key, bank, k, count, cell_log2=cell_log2)
    want_sim, want_index = reference.bank_topk(key.double(), bank.double(), k, count)
    torch.testing.assert_close(sim.double(), want_sim, atol=1e-6, rtol=1e-5)
    assert (index == want_index).float().mean() > 0.99


def test_bank_topk_of_odd_widths(gpu):
    _, key, bank, _ = problem(5, 257, 33, dtype=torch.bfloat16)
    key, count = key.bfloat16(), torch.tensor(257)
    sim, _ = cuda.bank_topk(key, bank, 20, count)
    want = reference.bank_topk(key.double(), bank.double(), 20, count)
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
        _, index = cuda.bank_topk(key, bank, k, count, cell_log2=cell_log2)
        want = reference.bank_topk(key.double(), bank.double(), k, count)[1]
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
    outputs = ("neg_lse", "neg_mean", "neg_sq_lse", "neg_count", "topk_sim", "topk_index")
    runtime.module().cuda.bank_pass(
        query=0, key=4096, bank=4096, count=0, s_pos=0, rng_state=0, batch=1, slots=slots, dim=dim,
        dtype=1, selection=2, temperature=1.0, a=0.0, b=0.0, topk=k, row_offset=0, col_offset=0,
        sums=False, null_epilogue=False, force_sm80=False, cell_log2=0, device=0, stream=0,
        allocate=lambda size: 4096, **dict.fromkeys(outputs, 0),
    )  # fmt: skip
    planned_log2, planned_group, room = struct.unpack_from("3i", gpu.values[0], 116)  # PassArgs
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
    draw = torch.Generator().manual_seed(batch)
    slots = torch.randint(-3, size + 3, (batch, 7), generator=draw)
    slots[:, 3] = slots[:, 5]
    slots[0] = 2**40
    bank_ids = torch.randint(-1, 2 * batch, (size,), generator=draw)
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
    gpu.capability = CAPABILITY[path]
    p, settings = cold.problem(size=230), {"selection": selection, "temperature": temperature}
    cold.assert_step(cold.step(cuda, p, dtype, **settings), cold.answer(p, **settings), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "dim", "count"), [(3, 63, 24, 40), (70, 300, 128, 300), (2, 130, 250, 0)]
)
@pytest.mark.parametrize("hides", [False, True])
def test_weighted_pass(gpu, hides, batch, size, dim, count, dtype):
    query, _, bank, _ = problem(batch, size, dim, dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    rows = {name: torch.rand(batch, generator=draw) - 0.3 for name in ("alpha", "beta", "gamma")}
    query = query.to(dtype).float()
    rows["top"] = (query @ bank.float().T).max(1).values
    rows["cap"] = torch.full((batch,), 0.2)
    rho = torch.rand(size, generator=draw) - 0.5
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
    log_sum, mean, weight = cuda.weighted_pass(*args)
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
    state = torch.tensor([SEED, OFFSET])
    settings = {"row_offset": row_offset, "col_offset": col_offset, "topk": 0}
    got, _ = both(gpu, (query, query, bank, torch.zeros(19)), path, a=44.0, b=0.0, **settings)
    words = noise.philox_block(row_offset, 19, 64, col_offset, state)
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
        cuda.enqueue(keys, labels, ids, got.bank, got.labels, bank_ids, got.ptr, got.count)
        assert torch.equal(bank_ids, named)
        assert torch.equal(got.ptr, want.ptr)
        assert torch.equal(got.count, want.count)
        assert torch.equal(got.labels, want.labels)
        torch.testing.assert_close(got.bank, want.bank, atol=0, rtol=2.0**-8)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("soft_weights", ["attention", "uniform", "binary"])
@pytest.mark.parametrize(("size", "topk"), [(60, 5), (3, 3), (60, 0), (0, 5)])
def test_finish_is_the_loss_and_its_gradient(gpu, size, topk, soft_weights, selection, dtype):
    """Of a pass without what it mined, against functional.psm_loss under autograd."""
    query, key, bank, s_pos = problem(4, max(size, 10), 20, dtype=dtype)
    rng_state = torch.tensor([SEED, OFFSET])
    settings = {
        "temperature": 0.3,
        "selection": selection,
        "a": 2.0,
        "b": -0.1,
        "row_offset": 3,
    }
    rest = {"soft_weights": soft_weights, "weight_temperature": 0.7, "hard_weight": 0.6}
    count = torch.tensor(size)
    swept = bank_pass(
        query, key, bank, count, s_pos, **settings, topk=topk, rng_state=rng_state,
        exclude_mined=True, backend="reference",
    )  # fmt: skip
    loss, grad, (kept, mean, var) = cuda.psm_finish(
        query, key, bank, s_pos, swept, temperature=settings["temperature"], **rest
    )
    leaf = query.clone().requires_grad_()
    want = functional.psm_loss(
        leaf, key, bank, count=count, topk=topk, rng_state=rng_state, reduction="none",
        return_stats=True, backend="reference", **settings, **rest,
    )  # fmt: skip
    want.loss.sum().backward()
    torch.testing.assert_close(loss, want.loss.detach(), atol=2e-5, rtol=1e-5)
    along = (grad * query).sum(1, keepdim=True) * query  # psm_loss normalizes its query
    torch.testing.assert_close(grad - along, leaf.grad, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(kept, want.stats.kept_count, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mean, want.stats.grad_mean, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(var, want.stats.grad_var, atol=1e-5, rtol=1e-2)


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
