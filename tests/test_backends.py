import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import problem

from psm_kernels import MemoryBank, PSMLoss
from psm_kernels.backends import compiled, cuda, registry
from psm_kernels.backends.reference import Reference
from psm_kernels.functional import psm_loss
from psm_kernels.options import PassOptions, PSMOptions


def test_the_command_prints_the_table_and_what_auto_picks():
    run = subprocess.run(
        [sys.executable, "-m", "psm_kernels"], capture_output=True, text=True, check=True
    )
    for name in registry.TABLE:
        assert name in run.stdout
    picked = registry.choose("auto", torch.ones(2, 8)).name
    assert f"auto on cpu: {picked}" in run.stdout
    if cuda.built_for():
        assert f"CUDA kernels compiled for sm_{cuda.built_for()}\n" in run.stdout


@pytest.fixture
def fresh():
    """Choices are remembered."""
    registry._choose.cache_clear()
    yield
    registry._choose.cache_clear()


def test_bank_topk_takes_what_bank_pass_does_not(monkeypatch, fresh):
    for backend in registry.TABLE.values():
        monkeypatch.setattr(backend, "unavailable", lambda: None)
    bank = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(9, 300))
    assert registry.choose("cuda", bank, sums=False) is registry.TABLE["cuda"]
    with pytest.raises(ValueError, match=r"at most 256 columns, not 300; these can: triton, ref"):
        registry.choose("cuda", bank)
    with pytest.raises(ValueError, match=r"mines at most 1024 slots per row, not 1025"):
        registry.choose("triton", bank, 1025)


def test_a_gpu_does_not_make_triton_take_host_memory(monkeypatch, fresh):
    monkeypatch.setattr(registry.TABLE["triton"], "unavailable", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1; these can: cpp, reference"):
        registry.choose("triton", torch.ones(2, 8))


def test_a_backend_of_ones_own_needs_no_table():
    """As benchmarks/slab.py: one class with the two operators."""
    calls = []

    class Own(Reference):
        name = "own"

        def bank_pass(self, *args):
            calls.append("bank_pass")
            return super().bank_pass(*args)

    query, key, bank, _ = problem(4, 30, 8)
    criterion = PSMLoss(0.2, (30, 8), topk=2, backend=Own(), selection="all")
    criterion.enqueue(bank)
    wanted = psm_loss(query, key, bank, temperature=0.2, topk=2, selection="all")
    torch.testing.assert_close(criterion(query, key, update=False), wanted)
    assert calls == ["bank_pass"]


# --- the cuda backend without a GPU --------------------------------------------------------------


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


needs_kernels = pytest.mark.skipif(cuda.built_for() is None, reason="built without CUDA kernels")


@needs_kernels
def test_the_table_has_the_limits_of_the_kernels():
    from psm_kernels import _C

    row = registry.TABLE["cuda"]
    assert (row.max_dim, row.max_topk_dim) == (_C.cuda.max_dim, _C.cuda.max_topk_dim)
    assert row.max_step_topk == _C.cuda.max_step_topk


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="host addresses, to be refused by no driver")
@pytest.mark.parametrize("kernel", ["bank_pass", "bank_topk", "psm_step", "enqueue"])
def test_every_argument_reaches_the_runtime(kernel, monkeypatch):
    """All names and types are as the module wants them, and the runtime's error is an exception."""
    monkeypatch.setattr(cuda, "_place", lambda bank: {"device": 0, "stream": 0})
    query, key, bank, s_pos = problem(4, 30, 8)
    rng_state, memory, backend = torch.tensor([1, 2]), MemoryBank(30, 8), cuda.Cuda()
    options = PassOptions(0.2, "bernoulli", topk=3)
    state = memory.bank, memory.labels, memory.ids, memory.ptr, memory.count
    calls = {
        "bank_pass": lambda: backend.bank_pass(
            query, key, bank, memory.count, s_pos, options, rng_state=rng_state
        ),
        "bank_topk": lambda: backend.bank_topk(query, bank, 3, memory.count),
        "psm_step": lambda: backend.psm_step(
            query, key, bank, memory.count, PSMOptions(0.2), rng_state=rng_state
        ),
        "enqueue": lambda: backend.enqueue(key, None, None, *state),
    }
    with pytest.raises(RuntimeError, match=r"^psm_kernels: cuda[A-Za-z]+: cudaError"):
        calls[kernel]()
