"""`psm_step` and `enqueue` of the cuda backend on the CPU, as test_cuda_host.py has bank_pass."""

import ctypes
import math
import sys
from pathlib import Path

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
from ptx import runtime
from torch.utils._python_dispatch import TorchDispatchMode

import psm_kernels
from psm_kernels import PSMLoss
from psm_kernels.bank.memory_bank import MemoryBank


@pytest.mark.parametrize("key_dtype", LOW, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_enqueue(gpu, key_dtype, dtype):
    want = MemoryBank(10, 20, dtype=dtype)
    got = MemoryBank(10, 20, dtype=dtype)
    bank_ids, named = torch.full((2, 10), -1)
    rng_state = torch.tensor([7, 2**32 - 3])
    for calls, batch in enumerate((3, 4, 1, 10, 23, 5), 1):
        keys = torch.randn(batch, 20).to(key_dtype)
        if batch > 4:
            keys[1], keys[2, 3], keys[3, 0] = 0.0, math.nan, math.inf
        labels = torch.arange(batch) if batch != 4 else None
        ids = labels + 100 if batch % 2 else None
        if ids is not None:
            ids[-1] = -7
        slots = torch.arange(int(got.ptr), int(got.ptr) + batch)[-10:] % 10
        named[slots] = -1 if ids is None else ids[-10:].clamp_min(-1)
        want.enqueue(keys, labels)
        state = (got.bank, got.labels, bank_ids, got.ptr, got.count, rng_state)
        CUDA.enqueue(keys, labels, ids, *state)
        assert rng_state.tolist() == [7, 2**32 - 3 + calls]
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
    known = ("unit_kernel", "mined_kernel", "loss_kernel")
    stages = [name for launch in gpu.launches for name in known if name in launch]
    assert stages == [name for name in known if topk or name != "mined_kernel"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_psm_step_reduced(gpu, reduction):
    """By whichever block is the last, in the order of the rows."""
    query, key, bank = exact_rows(200, 90, dtype=torch.bfloat16)
    settings = {"temperature": 0.3, "count": 90}
    rows, gradient = step(gpu, "sm80", query, key, bank, **settings)
    loss, reduced = step(gpu, "sm80", query, key, bank, reduction=reduction, **settings)
    assert loss.shape == ()
    torch.testing.assert_close(loss, getattr(rows, reduction)(), atol=0, rtol=1e-6)
    share = 1 / 200 if reduction == "mean" else 1.0
    torch.testing.assert_close(reduced, share * gradient, atol=0, rtol=1e-6)


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


# --- a step of training --------------------------------------------------------------------------


def training_step(gpu, *, ids: bool):
    gpu.runs = False
    criterion = PSMLoss(0.5, (65_536, 128), bank_dtype=torch.bfloat16, backend=CUDA)
    query, key = torch.randn(256, 128, requires_grad=True), torch.randn(256, 128)
    named = torch.arange(256) if ids else None

    def run():
        query.grad = None
        criterion(query, key, ids=named).backward()

    return run


class Launching(TorchDispatchMode):
    """Notes torch's operators but those that only make a tensor or a view."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in ("detach", "empty", "empty_like", "new_empty", "view", "slice", "select"):
            self.names.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("ids", [False, True])
def test_launches_of_a_training_step(gpu, ids):
    """Forward, backward and enqueue: eight, where no slots are hidden by ids."""
    run, memsets = training_step(gpu, ids=ids), ctypes.CDLL(str(runtime.library())).fake_memsets
    run()
    gpu.launches.clear()
    before = memsets()
    with Launching() as torchs:
        run()
    stages = ("unit", "mark", "sm90", "mined", "sm90", "loss", "enqueue")
    stages = [name for name in stages if ids or name != "mark"]
    assert len(gpu.launches) == len(stages)
    assert all(name in launch for name, launch in zip(stages, gpu.launches, strict=True))
    assert memsets() == before
    assert torchs.names == ["threshold"] * ids + ["ones_like", "mul"]


def test_calls_of_a_training_step(gpu):
    """What the host has to do, in calls of Python and from it into C: times are of a machine."""
    run, calls = training_step(gpu, ids=False), []
    package = str(Path(psm_kernels.__file__).parent)

    def note(frame, event, what):
        if event.endswith("call") and frame.f_code.co_filename.startswith(package):
            calls.append(frame.f_code.co_qualname)

    run()
    sys.setprofile(note)
    run()
    sys.setprofile(None)
    assert len(calls) <= 130, calls
