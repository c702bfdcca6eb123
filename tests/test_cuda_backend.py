"""The cuda backend as Python sees it, without a GPU and without running a kernel."""

import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import problem

from psm_kernels import MemoryBank
from psm_kernels.backends import compiled, cuda
from psm_kernels.backends.cuda import Cuda
from psm_kernels.options import PassOptions, PSMOptions


@pytest.mark.parametrize("reason", ["built without the CUDA kernels (no nvcc)", None])
def test_a_module_without_cuda_says_why(reason, monkeypatch):
    module = ModuleType("psm_kernels._C")
    monkeypatch.setattr("psm_kernels._C", module, raising=False)
    monkeypatch.setitem(sys.modules, "psm_kernels._C", module)
    info = SimpleNamespace(MISSING_CUDA=reason) if reason else None  # None: cannot be imported
    monkeypatch.setitem(sys.modules, "psm_kernels._build_info", info)
    monkeypatch.setattr(compiled, "unavailable", lambda: None)
    assert f"{reason or 'built without the CUDA kernels'}: build" in cuda.unavailable.__wrapped__()
    assert cuda.built_for() is None
    assert Cuda().notes() == []


needs_kernels = pytest.mark.skipif(cuda.built_for() is None, reason="built without CUDA kernels")


@needs_kernels
def test_the_class_has_the_limits_of_the_kernels():
    from psm_kernels import _C

    limits = _C.cuda.max_dim, _C.cuda.max_topk_dim, _C.cuda.max_step_topk
    assert (Cuda.max_dim, Cuda.max_topk_dim, Cuda.max_step_topk) == limits


def calls(backend: Cuda):
    query, key, bank, s_pos = problem(4, 30, 8)
    memory, rng_state = MemoryBank(30, 8), torch.tensor([1, 2])
    written = memory.bank, memory.labels, memory.ids, memory.ptr, memory.count
    options = PassOptions(0.2, "bernoulli", topk=3)
    affine, rho = torch.ones(5, 4), torch.ones(30)
    return {
        "bank_pass": lambda: backend.bank_pass(
            query, key, bank, memory.count, s_pos, options, rng_state=rng_state
        ),
        "bank_topk": lambda: backend.bank_topk(query, bank, 3, memory.count),
        "weighted_pass": lambda: backend.weighted_pass(query, bank, memory.count, 0.2, affine, rho),
        "psm_step": lambda: backend.psm_step(
            query.double(), key, bank, memory.count, PSMOptions(), rng_state=rng_state
        ),
        "enqueue": lambda: backend.enqueue(key.double(), None, None, *written),
    }


NAMES = list(calls(Cuda()))


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="host addresses, to be refused by no driver")
@pytest.mark.parametrize("name", NAMES)
def test_every_argument_reaches_the_runtime(name, monkeypatch):
    """All names and types are as the module wants them, and the runtime's error is an exception."""
    monkeypatch.setattr(cuda, "_place", lambda bank: {"device": 0, "stream": 0})
    with pytest.raises(RuntimeError, match=r"^psm_kernels: cudaGetDevice: cudaError"):
        calls(Cuda())[name]()


@needs_kernels
def test_wrong_arguments_are_refused_before_the_runtime():
    from psm_kernels import _C

    at = 4096
    bank = {"rows": at, "slots": 9, "dim": 8, "count": at}

    def refuses(message, cell_log2=0, **changes):
        args = _C.PassArgs(
            options=_C.PassOptions(selection=changes.pop("selection", 2), topk=1), batch=1, key=at,
            bank=_C.Bank(**bank | changes), topk_sim=at, topk_index=at,
        )  # fmt: skip
        with pytest.raises(ValueError, match=message):
            _C.cuda.workspace_bytes(args, device=0, cell_log2=cell_log2)

    refuses("^dim: got 4097", dim=4097)
    refuses("^slots: got 0", slots=0)
    refuses("^bank: got a null pointer", rows=0)
    refuses("^bank: got address 4098", rows=4098)
    refuses("^dtype: got 3", dtype=3)
    refuses("^cell_log2: got 21", cell_log2=21)
    refuses("got", selection=3)  # kAffine mines nothing
    step = _C.StepArgs(pass_=_C.PassArgs(bank=_C.Bank(**bank), batch=1), query=at, key=at, loss=at)
    with pytest.raises(ValueError, match=r"^gradient: got a null pointer"):
        _C.cuda.workspace_bytes(step, device=0)


@pytest.mark.skipif(compiled.unavailable() is not None, reason="needs psm_kernels._C")
@pytest.mark.parametrize("name", NAMES)
def test_what_a_call_makes_lives_until_the_launch(name, monkeypatch):
    """Without a caching allocator memory that nobody holds is unmapped before the kernel runs."""
    from psm_kernels import _C

    given, alive = [], []
    address = torch.Tensor.data_ptr

    def data_ptr(tensor):
        given.append(weakref.ref(tensor))
        return address(tensor)

    def run(*args, **place):
        alive.append(all(tensor() is not None for tensor in given))

    runs = dict.fromkeys(("bank_pass", "psm_step", "enqueue"), run)
    kernels = SimpleNamespace(**runs, workspace_bytes=lambda *args, **flags: 256)
    structs = {name: getattr(_C, name) for name in dir(_C) if name[0].isupper()}
    monkeypatch.setattr("psm_kernels._C", SimpleNamespace(cuda=kernels, **structs))
    monkeypatch.setattr(cuda, "_place", lambda bank: {"device": 0, "stream": 0})
    monkeypatch.setattr(cuda, "_load", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)
    calls(Cuda())[name]()
    assert given
    assert alive == [True]
