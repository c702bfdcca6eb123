"""`bank_topk` of the cuda backend on the CPU, as test_cuda_host.py has bank_pass."""

import struct

import pytest
import torch
from conftest import problem
from cuda_cases import (
    CAPABILITY,
    CUDA,
    PATHS,
    REFERENCE,
    arguments,
    both,
)
from ptx import runtime

from psm_kernels.backends.base import Exclude
from psm_kernels.backends.cuda import Cuda

CELLS = 244  # where KernelArgs has its cells


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
        (65_536, 128, 5, 4, 4),
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


@pytest.mark.parametrize(("path", "turns"), [("sm80", 32), ("sm90", 8)])
def test_memory_of_many_rows_and_slots_is_bounded(gpu, path, turns):
    """Cell maxima of 65,536 rows by a million slots would take 4.3 GB; they are made in turns."""
    batch, dim = 65_536, 16
    gpu.capability, gpu.multiprocessors, gpu.runs = CAPABILITY[path], 132, False
    query = torch.zeros(batch, dim, dtype=torch.bfloat16)
    bank = torch.zeros(1 << 20, dim, dtype=torch.bfloat16)
    taken = []
    allocate = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: taken.append(allocate(*a, **k)) or taken[-1])
        CUDA.bank_topk(query, bank, 5, torch.tensor(len(bank)))
        CUDA.bank_pass(*arguments(query, query, bank, torch.zeros(batch), topk=5))
    largest = max(x.nbytes for x in taken if x.dtype == torch.uint8)
    assert 100 << 20 < largest < 180 << 20
    assert sum("mined_kernel" in name for name in gpu.launches) == 2 * turns


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize(
    ("size", "dim", "k", "cut"),
    [(300, 520, 7, 2), (90, 1000, 30, 1), (70, 4096, 5, 1), (90, 1001, 5, 1)],
)
def test_bank_topk_of_text_encoders(gpu, path, dtype, size, dim, k, cut):
    """Rows wider than shared memory holds, of odd widths; what is hidden is not found."""
    gpu.capability, gpu.multiprocessors = CAPABILITY[path], cut
    _, key, bank, _ = problem(3, size, dim, dtype=dtype)
    bank[size - 10 :] = torch.nan
    key, count = key.to(dtype), torch.tensor(size - 10)
    exclude = Exclude(torch.arange(6).view(3, 2))
    sim, index = CUDA.bank_topk(key, bank, k, count, exclude)
    want_sim, want_index = REFERENCE.bank_topk(key.double(), bank.double(), k, count, exclude)
    assert torch.equal(index, want_index)
    torch.testing.assert_close(sim.double(), want_sim, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("path", ["sm80", "sm90"])
@pytest.mark.parametrize(("size", "k"), [(2200, 2048), (2200, 1000), (1500, 2048)])
def test_bank_topk_of_thousands(gpu, path, size, k):
    gpu.capability = CAPABILITY[path]
    _, key, bank, _ = problem(2, size, 16, dtype=torch.bfloat16, few_bits=True)
    key, count = key.bfloat16(), torch.tensor(size - 40)
    sim, index = CUDA.bank_topk(key, bank, k, count)
    want_sim, want_index = REFERENCE.bank_topk(key.double(), bank.double(), k, count)
    assert torch.equal(index, want_index)
    assert torch.equal(sim.double(), want_sim)
