"""Passes over rows of more than 256 columns, and tiles by the shared memory that a block can have:
as test_cuda_host.py has the others, on the CPU."""

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
    STATE,
    arguments,
    assert_agree,
    both,
    hidden,
    step,
    step_in_float64,
)
from ptx import runtime

from psm_kernels import noise
from psm_kernels.backends.base import NOTHING
from psm_kernels.weighted import weighted_pass

pytestmark = pytest.mark.skipif(
    runtime.unavailable() is not None, reason=str(runtime.unavailable())
)


def exact(batch: int, size: int, dim: int, dtype) -> tuple[torch.Tensor, ...]:
    """Rows whose products are exact, spread over all panels of 64 columns."""
    query, key, bank, s_pos = problem(batch, size, 256, dtype=dtype, few_bits=True)
    columns = torch.randperm(dim, generator=torch.Generator().manual_seed(dim))[:256]
    spread = [rows.new_zeros(len(rows), dim) for rows in (query, key, bank)]
    for rows, narrow in zip(spread, (query, key, bank), strict=True):
        rows[:, columns] = narrow
    return *spread, s_pos


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize(
    ("batch", "size", "dim", "topk", "cut"),
    [(1, 1, 264, 0, 1), (3, 97, 320, 0, 2), (35, 150, 512, 5, 2), (5, 90, 500, 5, 1),
     (3, 210, 768, 0, 3), (2, 63, 767, 0, 1)],
)  # fmt: skip
def test_odd_sizes(gpu, path, dtype, batch, size, dim, topk, cut, selection):
    count = max(1, size - size // 3)
    query, key, bank, s_pos = problem(batch, size, dim, dtype=dtype)
    bank[count:] = torch.nan
    settings = {"count": count, "selection": selection, "topk": topk}
    got, want = both(gpu, (query, key, bank, s_pos), path, cut, **settings)
    assert_agree(got, want, dtype)
    assert torch.equal(got.topk_index, want.topk_index)
    sums = gpu.launches[-2]
    assert "bank_pass_sm80" in sums
    assert ("PassFp32ILi768E" if dtype == torch.float32 else "WideSm80") in sums


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dim", [320, 600, 768])
def test_all_warps_of_a_row_draw_the_canonical_noise(gpu, dtype, dim):
    """A bank of unit vectors: the mean of what is kept is the mask itself, each column of it from
    the warp that owns the column."""
    bank, query = torch.eye(dim).to(dtype), torch.full((19, dim), 2.0**-5)
    settings = {"row_offset": 7, "col_offset": 21, "topk": 0, "a": 700.0, "b": 0.0}
    got, _ = both(gpu, (query, query, bank, torch.zeros(19)), "sm80", 2, **settings)
    words = noise.philox_block(7, 19, dim, 21, STATE)
    assert torch.equal(got.neg_mean > 0, words < math.exp(-700.0 / 1024) * 2**32)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dim", [320, 512])
def test_exact_products_give_the_same_masks(gpu, dtype, dim):
    for cut, a in ((1, 0.0), (4, 8.0), (2, 1e30)):
        got, want = both(gpu, exact(9, 300, dim, dtype), "sm80", cut, a=a, b=0.0)
        assert torch.equal(got.neg_count, want.neg_count.float())
        assert torch.equal(got.topk_index, want.topk_index)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("warps", [1, 4])
def test_it_does_not_matter_when_copies_arrive(gpu, warps, dtype):
    """Late in all other tests; and warps that do not go in step show a missing barrier. Blocks of
    rows follow each other in one block of threads, whose ring of stages goes round."""
    gpu.warps = warps
    for early in (True, False):
        gpu.early = early
        got, want = both(gpu, problem(35, 170, 700, dtype=dtype), "sm80", count=165, topk=0)
        assert_agree(got, want, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("dim", "topk"), [(512, 5), (600, 0)])
@pytest.mark.parametrize("selection", ["bernoulli", "all"])
def test_what_is_hidden_is_not_summed(gpu, dtype, dim, topk, selection):
    exclude = hidden(35, 200, 190)
    settings = {"count": 190, "exclude": exclude, "exclude_mined": topk > 0, "topk": topk}
    settings |= {"selection": selection, "col_offset": 21}
    got, want = both(gpu, problem(35, 200, dim, dtype=dtype), "sm80", 2, **settings)
    assert_agree(got, want, dtype)
    assert torch.equal(got.topk_index, want.topk_index)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_spoils_itself_alone(gpu, dtype, bad):
    query, key, bank, s_pos = problem(20, 60, 320, dtype=dtype)
    good = both(gpu, (query, key, bank, s_pos), "sm80", topk=0)[0]
    query = query.clone()
    query[3, 300] = bad
    got = both(gpu, (query, key, bank, s_pos), "sm80", topk=0)[0]
    assert got.neg_lse[3].isnan()
    assert got.neg_mean[3].isnan().all()
    other = torch.tensor([row for row in range(20) if row != 3])
    for a, b in zip(got, good, strict=True):
        assert torch.equal(a[other], b[other])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_an_empty_bank(gpu, dtype):
    query, key, bank, s_pos = problem(3, 40, 520, dtype=dtype)
    bank = torch.full_like(bank, torch.nan)
    got, _ = both(gpu, (query, key, bank, s_pos), "sm80", count=0, topk=0)
    assert (got.neg_lse == -math.inf).all()
    assert not got.neg_mean.any()
    assert not got.neg_count.any()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_cold_temperature_with_equal_similarities(gpu, dtype, sign):
    """The shift of a row moves in all warps that share it, or in none."""
    row = torch.zeros(512)
    row[::2] = 1 / 16
    query, bank = row.expand(3, 512).clone(), (sign * row).expand(100, 512).contiguous().to(dtype)
    cold = {"temperature": 0.02, "selection": "all", "topk": 0}
    got, _ = both(gpu, (query, query, bank, torch.ones(3)), "sm80", **cold)
    assert got.neg_lse.tolist() == pytest.approx([sign * 50 + math.log(100)] * 3, rel=1e-6)
    torch.testing.assert_close(got.neg_mean, bank[:3].float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize(("dim", "topk"), [(512, 5), (768, 0)])
def test_psm_step(gpu, path, dtype, dim, topk):
    query, key, bank, _ = exact(4, 70, dim, dtype)
    settings = {"temperature": 0.3, "a": 2.0, "b": -0.1, "row_offset": 3, "topk": topk, "count": 60}
    got = step(gpu, path, query * 4.0, key / 2.0, bank, **settings)
    want = step_in_float64(query * 4.0, key / 2.0, bank, **settings)
    cold.assert_step(got, want, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("dim", "hides"), [(300, True), (768, False)])
def test_weighted_pass(gpu, dim, hides, dtype):
    query, _, bank, _ = problem(3, 100, dim, dtype=dtype)
    random = torch.Generator().manual_seed(1)
    rows = {name: torch.rand(3, generator=random) - 0.3 for name in ("alpha", "beta", "gamma")}
    query = query.to(dtype).float()
    rows["top"] = (query @ bank.float().T).max(1).values
    rows["cap"] = torch.full((3,), 0.2)
    rho = torch.rand(100, generator=random) - 0.5
    exclude = hidden(3, 100, 90) if hides else NOTHING
    want = weighted_pass(
        query.double(), bank.double(), 90, temperature=0.3,
        **{name: value.double() for name, value in rows.items()},
        rho=rho.double(), exclude=exclude, backend="reference",
    )  # fmt: skip
    bank[90:], rho[90:] = torch.nan, torch.nan
    affine = torch.stack(tuple(rows.values()))
    args = (query.to(dtype), bank, torch.tensor(90), 0.3, affine, rho, exclude)
    log_sum, mean, weight = CUDA.weighted_pass(*args)
    torch.testing.assert_close(log_sum.double(), want.log_sum, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight.double(), want.weight, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mean.double(), want.mean, atol=MEAN_ATOL[dtype], rtol=1e-4)


def test_wider_rows_are_refused(gpu):
    query, key, bank, s_pos = problem(2, 10, CUDA.max_dim + 1)
    for selection in ("bernoulli", "all"):
        args = arguments(query, key, bank, s_pos, topk=0, selection=selection)
        with pytest.raises(ValueError, match=rf"^dim: got {CUDA.max_dim + 1}, wanted"):
            CUDA.bank_pass(*args)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("kilobytes", "warps"), [(99, 4), (163, 8), (227, 8)])
def test_shared_memory_decides_how_many_rows_a_tile_serves(gpu, kilobytes, warps, dtype):
    gpu.block_kilobytes = kilobytes
    settings = {"count": 190, "exclude": hidden(130, 200, 190), "exclude_mined": True}
    got, want = both(gpu, problem(130, 200, 256, dtype=dtype), "sm80", 1, **settings)
    assert_agree(got, want, dtype)
    if dtype != torch.float32:
        assert all(f"Li256ELi{warps}E" in name for name in gpu.launches if "sm80" in name)
        assert sum("sm80" in name for name in gpu.launches) == 2
