"""The cuda backend run on the CPU: the real module and launches, the PTX that nvcc makes of
csrc/cuda, an instruction at a time (tests/ptx).

It checks layouts, descriptors, swizzles, barriers, waits, bounds, masks, noise, merge and launch,
and knows nothing of time, of ptxas, or of what a GPU does at once: for those see test_cuda.py.
"""

import math

import cold
import pytest
import torch
from conftest import problem
from cuda_cases import (
    CUDA,
    LOW,
    MEAN_ATOL,
    PATHS,
    REFERENCE,
    STATE,
    arguments,
    assert_agree,
    both,
    hidden,
    step,
)

from psm_kernels import noise
from psm_kernels.backends.base import EMPTY, NOTHING, Exclude
from psm_kernels.backends.cuda import Cuda
from psm_kernels.weighted import weighted_pass


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


@pytest.mark.parametrize(
    ("batch", "size", "dim", "items"),
    [
        (256, 65_536, 128, 2 * 64),  # eight tiles each; with 66 splits some had eight all the same
        (1024, 65_536, 256, 8 * 16),  # one wave; 33 splits made two of half the length
        (4096, 262_144, 256, 32 * 4),
        (64, 65_536, 64, 128),
    ],
)
def test_the_fewest_splits_that_end_as_early(gpu, batch, size, dim, items):
    gpu.multiprocessors, gpu.runs = 132, False
    query, bank = (torch.zeros(n, dim, dtype=torch.bfloat16) for n in (batch, size))
    CUDA.bank_pass(*arguments(query, query, bank, torch.zeros(batch), topk=0))
    assert gpu.grids[0] == items


@pytest.mark.parametrize(
    ("batch", "size", "dim", "count", "cut"),
    [(130, 1700, 64, 1700, 1), (3, 100, 128, 90, 1), (20, 900, 256, 850, 3), (3, 300, 64, 0, 1)],
)
@pytest.mark.parametrize("warps", [1, 4])
def test_warpgroups_that_take_turns_sum_the_same(gpu, warps, batch, size, dim, count, cut):
    """Odd numbers of tiles, one tile, none, and blocks of rows that one block takes in turn."""
    gpu.warps, gpu.multiprocessors = warps, cut
    args = arguments(*problem(batch, size, dim, dtype=torch.bfloat16), topk=0, count=count)
    want = Cuda().bank_pass(*args)
    assert "WorkE3" not in gpu.launches[0]
    gpu.launches.clear()
    got = Cuda(ping_pong=True).bank_pass(*args)
    assert "WorkE3" in gpu.launches[0]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
