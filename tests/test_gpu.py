"""Losses and modules on a GPU, on every backend, against the reference on the CPU. The noise is
canonical, so that the same negatives are drawn."""

import copy

import cold
import pytest
import torch
from conftest import problem

import psm_kernels
from psm_kernels import functional
from psm_kernels.backends import registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DRAW = {"rng_state": torch.tensor([5, 6]), "row_offset": 3}
LOSSES = {
    "psm": {"topk": 5, **DRAW},
    "info_nce": {},
    "hcl": {},
    "sscl": {"num_hard": 6, **DRAW},
    "unremix": {},
    "supcon": {"labels": torch.arange(33) % 5, "bank_labels": torch.arange(700) % 7 - 1},
    "nnclr": {},
    "ressl": {},
    "msf": {},
}


@pytest.fixture(params=[name for name, row in registry.TABLE.items() if name != "cpp"])
def backend(request) -> str:
    if reason := registry.TABLE[request.param].unavailable():
        pytest.fail(f"{request.param}: {reason}")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(backend, name, dtype):
    loss = getattr(functional, f"{name}_loss")
    query, key, bank, _ = problem(33, 700, 64, dtype=dtype, few_bits=True)
    found = {}
    for device, own in (("cpu", "reference"), ("cuda", backend)):
        leaf = query.to(device).requires_grad_()
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in LOSSES[name].items()}
        rows = loss(
            leaf, key.to(device), bank.to(device), count=600, reduction="none", backend=own, **moved
        )
        rows.sum().backward()
        found[device] = rows.detach().cpu(), leaf.grad.cpu()
    loose = 1e-4 if dtype is torch.float32 else 1e-2  # weights round to the bank's dtype
    for got, want in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(got, want, atol=loose, rtol=loose)


def test_the_module_trains_as_on_the_cpu(backend):
    here = psm_kernels.PSMLoss(0.2, memory_bank_size=(200, 32), backend="reference")
    there = copy.deepcopy(here).to("cuda")
    there.backend = backend
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):  # the third wraps around
        query, key = torch.randn(2, 80, 32, generator=generator)
        want = here(query.requires_grad_(), key)
        got = there(query.detach().cuda().requires_grad_(), key.cuda())
        torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=1e-4)
    got, want = there.state_dict(), here.state_dict()
    for name, value in want.items():
        torch.testing.assert_close(got[name].cpu(), value, atol=1e-6, rtol=1e-5)


def test_the_module_compiles_whole(backend):
    criterion = psm_kernels.PSMLoss(0.2, memory_bank_size=(200, 32), backend=backend).cuda()
    twin = copy.deepcopy(criterion)
    compiled = torch.compile(twin, fullgraph=True)
    for _ in range(3):
        query, key = torch.randn(2, 16, 32, device="cuda")
        got, want = compiled(query, key), criterion(query, key)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(twin.memory_bank.bank, criterion.memory_bank.bank)


def test_a_graph_holds_a_training_step(backend):
    """The loss, its gradient, the enqueue: nothing of it waits for the device."""
    if backend == "reference":
        pytest.skip("its topk asks the device for ties")
    criterion = psm_kernels.PSMLoss(0.2, memory_bank_size=(200, 32), backend=backend).cuda()
    query, key = torch.randn(2, 48, 32, device="cuda")
    query.requires_grad_()

    def step(criterion):
        loss = criterion(query, key)
        return loss.detach(), *torch.autograd.grad(loss, query)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(criterion)
    torch.cuda.current_stream().wait_stream(stream)
    twin, graph = copy.deepcopy(criterion), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(criterion)
    for _ in range(5):  # the fourth wraps around
        with torch.no_grad():
            query.normal_(), key.normal_()
        graph.replay()
        torch.testing.assert_close(captured, step(twin))
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(criterion.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("copies", [False, True], ids=["", "own copies"])
def test_cold_temperatures(backend, copies, selection, dtype):
    """Mined rows, and older copies of the queries, hold nearly all of what may not be summed."""
    p, settings = cold.problem(), {"selection": selection, "temperature": 0.02}
    given, unseen = {}, None
    if copies:
        ids, bank_ids = torch.arange(len(p.query)), torch.full((len(p.bank),), -1)
        far = (p.key @ p.bank.T).amax(0).argsort()[: len(ids)]
        p.bank[far], bank_ids[far] = p.query, ids
        unseen = bank_ids == ids[:, None]
        given = {"ids": ids.cuda(), "bank_ids": bank_ids.cuda()}
    leaf = p.query.cuda().requires_grad_()
    loss = functional.psm_loss(
        leaf, p.key.cuda(), p.bank.cuda().to(dtype), rng_state=cold.RNG_STATE.cuda(),
        reduction="none", backend=backend, **settings, **given,
    )  # fmt: skip
    loss.sum().backward()
    cold.assert_step((loss, leaf.grad), cold.answer(p, unseen=unseen, **settings), dtype)
