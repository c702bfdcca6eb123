"""The forms within the batch by passes over its rows, against plain loops in float64; and what they
take."""

import subprocess
import sys

import pytest
import torch
from conftest import able
from cuda_cases import CUDA
from formulas import data, expected_hcl, expected_info_nce, synthetic

from psm_kernels import HCLLoss, InfoNCELoss, PSMLoss, SSCLLoss
from psm_kernels.backends import registry
from psm_kernels.functional import hcl_loss, info_nce_loss, psm_loss, sscl_loss
from psm_kernels.losses import in_batch

FUSED = [name for name in registry.TABLE if able(name) and name != "reference"]
TEMPERATURES = [0.5, 0.07, 0.02]


def in_float32(batch, dim=20, seed=0):
    """The same rows twice: in float64, exact in float32, and in float32."""
    wide = [x.detach().float().double().requires_grad_() for x in data(batch, 1, dim, seed=seed)]
    return wide[:2], [x.detach().float().requires_grad_() for x in wide[:2]]


def assert_near(got, wanted, rows, wide, rtol=2e-5):
    torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=rtol)
    gradients = zip(torch.autograd.grad(got, rows), torch.autograd.grad(wanted, wide), strict=True)
    for a, b in gradients:
        torch.testing.assert_close(a.double(), b, rtol=20 * rtol, atol=rtol * max(1, b.abs().max()))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("batch", [1, 2, 3, 37])
def test_info_nce(backend, temperature, batch):
    wide, rows = in_float32(batch)
    got = info_nce_loss(*rows, temperature=temperature, backend=backend)
    assert_near(got, expected_info_nce(*wide, None, temperature=temperature), rows, wide)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("detach_weights", [False, True])
def test_hcl(backend, beta, detach_weights):
    wide, rows = in_float32(11)
    settings = {"temperature": 0.2, "beta": beta, "detach_weights": detach_weights}
    got = hcl_loss(*rows, **settings, backend=backend)
    assert_near(got, expected_hcl(*wide, None, **settings), rows, wide)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mix", ["pair", "query", "none"])
def test_sscl(backend, mix):
    wide, rows = in_float32(9)
    state = torch.tensor([3, 4])
    settings = {"temperature": 0.4, "tau_plus": 0.05}
    made = synthetic(*wide, None, state, 6, 3, mix)
    want = expected_hcl(*wide, None, **settings, made=made)
    got = sscl_loss(
        *rows, **settings, num_hard=6, num_synthetic=3, mix=mix, rng_state=state, backend=backend
    )
    assert_near(got, want, rows, wide)


@pytest.mark.parametrize("selection", ["all", "expected"])
def test_hard_term_of_psm_as_released(selection):
    """As the reference has it: fused where all negatives are kept, else on the matrix."""
    query, key, bank = data(13, 40, 20, dtype=torch.float32)
    settings = {"negatives": "neighbors", "selection": selection, "topk": 3}
    settings |= {"temperature": 0.3, "rng_state": torch.tensor([1, 2])}
    results = []
    for backend in ("cpp", "reference"):
        loss = psm_loss(query, key, bank, **settings, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (query, key))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [InfoNCELoss, HCLLoss, lambda **s: SSCLLoss(num_hard=8, **s)],
    ids=["nce", "hcl", "sscl"],
)
def test_large_batches_take_passes_by_themselves(make, monkeypatch):
    """From `fused_rows` on, with the values and gradients of the matrix."""
    monkeypatch.setattr(in_batch, "fused_rows", lambda device, dim: 24)
    calls, run = [], in_batch.ops.run_pass
    monkeypatch.setattr(
        in_batch.ops, "run_pass", lambda *args, **more: calls.append(args) or run(*args, **more)
    )
    for batch, passes in ((11, False), (12, True), (13, True)):
        query, key, _ = data(batch, dtype=torch.float32)
        found = []
        for backend in ("auto", "reference"):
            calls.clear()
            loss = make(temperature=0.3, memory_bank_size=0, backend=backend)(query, key)
            assert bool(calls) == (passes and backend == "auto")
            found.append((loss, *torch.autograd.grad(loss, (query, key))))
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [info_nce_loss, hcl_loss])
def test_on_the_gpu(gpu, loss):
    """The cuda kernels, run as PTX."""
    gpu.capability = 8
    wide, rows = in_float32(9)
    formula = expected_info_nce if loss is info_nce_loss else expected_hcl
    assert_near(loss(*rows, temperature=0.2, backend=CUDA), formula(*wide, None, temperature=0.2),
                rows, wide)  # fmt: skip
    assert any("bank_pass_sm80" in launch for launch in gpu.launches)


def test_equal_rows():
    """Every negative is a copy of the row: each counts, but the row's own two views."""
    row = torch.zeros(5, 8)
    row[:, 2] = 1.0
    rows = [row.clone().requires_grad_(), row.clone().requires_grad_()]
    loss = info_nce_loss(*rows, temperature=0.01, backend="cpp")
    torch.testing.assert_close(loss, torch.tensor(9.0).log())
    for gradient in torch.autograd.grad(loss, rows):
        torch.testing.assert_close(gradient, torch.zeros(5, 8), atol=1e-4, rtol=0)


def test_second_derivatives_are_refused():
    query, key, _ = data(6, dtype=torch.float32)
    loss = info_nce_loss(query, key, backend="cpp")
    (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(gradient.sum(), query)


def test_a_backend_that_is_not_there_is_refused():
    query, key, _ = data(6, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^backend: 'cuda' cannot run"):
        info_nce_loss(query, key, backend="cuda")
    with pytest.raises(ValueError, match=r"^backend: got 'fast'"):
        info_nce_loss(query, key, backend="fast")


@pytest.mark.parametrize("loss", [info_nce_loss, hcl_loss])
def test_compiles_whole(loss):
    query, key, _ = data(6, dtype=torch.float32)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for run in (loss, compiled):
        value = run(query, key, backend="cpp")
        results.append((value, *torch.autograd.grad(value, (query, key))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


PEAK = """
import resource, sys, torch
from psm_kernels import functional
name, batch = sys.argv[1], int(sys.argv[2])
settings = {"logit_scale": 14.0} if name == "clip_loss" else {}
def step(batch):
    query, key = (torch.randn(batch, 64).requires_grad_() for _ in range(2))
    getattr(functional, name)(query, key, **settings, backend="cpp").backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(batch)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize("name", ["info_nce_loss", "hcl_loss", "sscl_loss", "clip_loss"])
def test_memory(name):
    """At 8,192 pairs: the matrix of SimCLR's views alone has 1,074 MB, that of CLIP 268 MB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, name, "8192"], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 200


def test_noise_state_is_left_as_it_was_by_a_failed_call():
    criterion = SSCLLoss(0.5, 0, num_hard=100)
    query, key, _ = data(4, dtype=torch.float32)
    before = criterion.rng_state.clone()
    with pytest.raises(ValueError, match="num_hard"):
        criterion(query, key)
    assert torch.equal(criterion.rng_state, before)


def test_a_bank_is_still_needed_where_it_was():
    with pytest.raises(ValueError, match="memory_bank_size"):
        PSMLoss(0.2, 0)
