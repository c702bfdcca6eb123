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
