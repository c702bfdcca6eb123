import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import problem

from psm_kernels import PSMLoss
from psm_kernels.backends import cuda, registry
from psm_kernels.backends.reference import Reference
from psm_kernels.bank import BankView
from psm_kernels.functional import hcl_loss, psm_loss, unremix_loss
from psm_kernels.options import PSMOptions


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
    bank = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(9, 800))
    assert registry.choose("cuda", bank, sums=False) is registry.TABLE["cuda"]
    with pytest.raises(ValueError, match=r"at most 768 columns, not 800; these can: ref"):
        registry.choose("cuda", bank)
    for name in ("triton", "auto"):  # which does not make B x K matrices instead
        with pytest.raises(
            ValueError, match=r"'triton' cannot run: mines at most 2048 slots per row"
        ):
            registry.choose(name, SimpleNamespace(**vars(bank) | {"shape": (9, 200)}), 2049)


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
    wanted = unremix_loss(query, key, bank)
    torch.testing.assert_close(unremix_loss(query, key, bank, backend=Own()), wanted)


def test_a_view_has_its_bank_with_it():
    query, key, bank, _ = problem(4, 30, 8)
    view = BankView(bank, 20)
    assert torch.equal(hcl_loss(query, key, view), hcl_loss(query, key, bank, count=20))
    for more in ({"count": 20}, {"bank_ids": torch.arange(30)}, {"backend": "reference"}):
        with pytest.raises(ValueError, match=r"^bank: got a BankView, which has count, bank_ids"):
            hcl_loss(query, key, view, **more)
    with pytest.raises(ValueError, match=r"^options: got PSMOptions.*, wanted HCLOptions"):
        hcl_loss(query, key, view, options=PSMOptions())
