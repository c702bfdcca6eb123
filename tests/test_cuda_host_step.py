"""`psm_step` and `enqueue` of the cuda backend on the CPU, as test_cuda_host.py has bank_pass."""

import math

import cold
import pytest
import torch
from conftest import problem
from cuda_cases import (
    CUDA,
    LOW,
    PATHS,
    exact_rows,
    hidden,
    step,
    step_in_float64,
)

from psm_kernels.bank.memory_bank import MemoryBank


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
