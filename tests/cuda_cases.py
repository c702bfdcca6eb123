"""Calls of the cuda backend and what they should give, for the machine of tests/ptx and for a GPU
alike."""

from __future__ import annotations

import pytest
import torch
from conftest import problem

from psm_kernels.backends.base import EMPTY, NOTHING, BankPass, Exclude
from psm_kernels.backends.cuda import Cuda
from psm_kernels.backends.reference import Reference
from psm_kernels.functional import psm_loss
from psm_kernels.options import PassOptions, PSMOptions

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
CUDA, REFERENCE = Cuda(), Reference()


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


def step(
    gpu, path, query, key, bank, *, count, exclude=NOTHING, row_offset=0, state=STATE, **settings
):
    gpu.capability, gpu.multiprocessors = CAPABILITY[path], 2
    options = PSMOptions(**{"reduction": "none", **settings})
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
