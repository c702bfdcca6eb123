import subprocess
import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import problem

from psm_kernels import MemoryBank
from psm_kernels.backends import registry
from psm_kernels.ops import cpp, cuda


def test_the_command_prints_the_table_and_what_auto_picks():
    run = subprocess.run(
        [sys.executable, "-m", "psm_kernels"], capture_output=True, text=True, check=True
    )
    for name in registry.TABLE:
        assert name in run.stdout
    picked = registry.choose("auto", torch.ones(2, 8)).__name__.rpartition(".")[2]
    assert f"auto on cpu: {picked}" in run.stdout
    if cuda.built_for():
        assert f"CUDA kernels compiled for sm_{cuda.built_for()}\n" in run.stdout


def test_bank_topk_takes_what_bank_pass_does_not(monkeypatch):
    module = ModuleType("psm_kernels.ops.cuda")
    monkeypatch.setattr(backends, "load", lambda name: module)
    registry._choose.cache_clear()
    bank = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(9, 300))
    assert registry.choose("cuda", bank, topk_only=True) is module
    with pytest.raises(ValueError, match=r"at most 256 columns, not 300; these can: triton, ref"):
        registry.choose("cuda", bank)
    registry._choose.cache_clear()


def test_a_gpu_does_not_make_triton_take_host_memory(monkeypatch):
    module = SimpleNamespace(interpreted=lambda: False)  # as loaded where there is a GPU
    monkeypatch.setattr(backends, "load", lambda name: module)
    registry._choose.cache_clear()
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1; these can: cpp, reference"):
        registry.choose("triton", torch.ones(2, 8))
    registry._choose.cache_clear()


# --- the cuda backend without a GPU --------------------------------------------------------------


@pytest.mark.parametrize("reason", ["built without the CUDA kernels (no nvcc)", None])
def test_a_module_without_cuda_says_why(reason, monkeypatch):
    module = ModuleType("psm_kernels._C")
    monkeypatch.setattr("psm_kernels._C", module, raising=False)
    monkeypatch.setitem(sys.modules, "psm_kernels._C", module)
    info = SimpleNamespace(MISSING_CUDA=reason) if reason else None  # None: cannot be imported
    monkeypatch.setitem(sys.modules, "psm_kernels._build_info", info)
    monkeypatch.setattr(cpp, "unavailable", lambda: None)
    assert f"{reason or 'built without the CUDA kernels'}: build" in cuda.unavailable.__wrapped__()
    assert cuda.built_for() is None


needs_kernels = pytest.mark.skipif(cuda.built_for() is None, reason="built without CUDA kernels")


@needs_kernels
def test_the_table_has_the_limits_of_the_kernels():
    from psm_kernels import _C

    row = registry.TABLE["cuda"]
    assert (row.max_dim, row.max_topk_dim) == (_C.cuda.max_dim, _C.cuda.max_topk_dim)
    assert _C.cuda.max_finish_topk == cuda.MAX_FINISH_TOPK


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="host addresses, to be refused by no driver")
@pytest.mark.parametrize("kernel", ["bank_pass", "bank_topk", "psm_finish", "enqueue"])
def test_every_argument_reaches_the_runtime(kernel, monkeypatch):
    """All names and types are as the module wants them, and the runtime's error is an exception."""
    monkeypatch.setattr(cuda, "_place", lambda bank: {"device": 0, "stream": 0})
    query, key, bank, s_pos = problem(4, 30, 8)
    rng_state, memory = torch.tensor([1, 2]), MemoryBank(30, 8)
    draw = {"temperature": 0.2, "selection": "bernoulli", "a": 0.5, "b": 0.0}
    rows, index = torch.zeros(4), torch.zeros(4, 3, dtype=torch.int64)
    swept = rows, torch.zeros(4, 8), rows, rows, torch.zeros(4, 3), index
    weighting = {"soft_weights": "attention", "weight_temperature": 1.0, "hard_weight": 1.0}
    calls = {
        "bank_pass": lambda: cuda.bank_pass(
            query, key, bank, memory.count, s_pos, *draw.values(), 3, rng_state, 0, 0
        ),
        "bank_topk": lambda: cuda.bank_topk(query, bank, 3, memory.count),
        "psm_finish": lambda: cuda.psm_finish(
            query, key, bank, s_pos, swept, temperature=0.2, **weighting
        ),
        "enqueue": lambda: cuda.enqueue(
            key, None, None, memory.bank, memory.labels, memory.ids, memory.ptr, memory.count
        ),
    }
    with pytest.raises(RuntimeError, match=r"^psm_kernels: cudaGetDevice: cudaError"):
        calls[kernel]()


def test_the_ticket_of_an_enqueue_lives_until_the_launch(monkeypatch):
    """Without a caching allocator memory that nobody holds is unmapped before the kernel runs."""
    made, alive = [], []
    zeros = torch.zeros

    def watched(*args, **kwargs):
        made.append(weakref.ref(out := zeros(*args, **kwargs)))
        return out

    memory, keys = MemoryBank(30, 8), torch.ones(4, 8)
    kernels = SimpleNamespace(enqueue=lambda **arguments: alive.extend(x() for x in made))
    monkeypatch.setattr("psm_kernels._C", SimpleNamespace(cuda=kernels), raising=False)
    monkeypatch.setattr(cuda, "_place", lambda bank: {})
    monkeypatch.setattr(torch, "zeros", watched)
    state = memory.bank, memory.labels, memory.ids, memory.ptr, memory.count
    cuda.enqueue(keys, None, None, *state)
    assert len(alive) == 1
    assert alive[0] is not None
