"""A loss that is run again inside backward: the first forward's gradient, or an error."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from psm_kernels import (
    HCLLoss,
    InfoNCELoss,
    MSFLoss,
    NNCLRLoss,
    PSMLoss,
    ReSSLLoss,
    SSCLLoss,
    SupConLoss,
    UnReMixLoss,
    functional,
)

each_way = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not"])
AGAIN = "run again inside backward.*leave it out of the checkpointed part"


class Step(nn.Module):
    """A network and its loss, which someone checkpoints together."""

    def __init__(self, criterion):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.criterion = nn.Linear(8, 8), criterion
        if criterion.memory_bank is not None:
            criterion.enqueue(torch.randn(20, 8), torch.arange(20) % 3)

    def forward(self, x, key):
        return self.criterion(self.layer(x), key, labels=torch.arange(len(x)) % 3)


def batch():
    x, key = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)).unbind()
    return x.requires_grad_(), key


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_refused(loss, module):
    """At the first recomputation, before anything is written again."""
    before = state(module)
    with pytest.raises(RuntimeError, match=AGAIN):
        loss.backward()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@each_way
@pytest.mark.parametrize(
    "make",
    [
        lambda b: PSMLoss(0.2, (32, 8), backend=b),
        lambda b: PSMLoss(0.2, (32, 8), selection="all", topk=0, backend=b),
        lambda b: InfoNCELoss(0.2, (32, 8), backend=b),
        lambda b: HCLLoss(0.5, (32, 8), backend=b),
        lambda b: SSCLLoss(0.5, (32, 8), num_hard=8, backend=b),
        lambda b: UnReMixLoss(0.5, (32, 8), backend=b),
        lambda b: SSCLLoss(0.5, 0, num_hard=8, backend=b),  # no bank, but noise
        lambda b: SupConLoss(0.1, (32, 8), backend=b),
        lambda b: NNCLRLoss(0.2, (32, 8), backend=b),
        lambda b: ReSSLLoss(0.1, (32, 8), backend=b),
        lambda b: MSFLoss((32, 8), backend=b),
    ],
    ids=[
        *("psm", "psm-all", "info_nce", "hcl", "sscl", "unremix", "sscl-batch"),
        *("supcon", "nnclr", "ressl", "msf"),
    ],
)
def test_a_loss_with_a_state_is_refused(backend, make, use_reentrant):
    step = Step(make(backend))
    x, key = batch()
    assert_refused(checkpoint(step, x, key, use_reentrant=use_reentrant), step)


@each_way
@pytest.mark.parametrize("kind", [InfoNCELoss, HCLLoss, UnReMixLoss])
def test_a_loss_without_a_state_is_right(kind, use_reentrant):
    step = Step(kind(0.5, 0))
    x, key = batch()
    step(x, key).backward()
    wanted, x.grad = x.grad, None
    checkpoint(step, x, key, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(x.grad, wanted)


@each_way
@pytest.mark.parametrize("name", ["psm", "sscl"])
def test_a_function_with_its_state_given_is_right(backend, name, use_reentrant):
    bank = nn.functional.normalize(torch.randn(32, 8), dim=1)
    x, key = batch()
    settings = {"psm": {}, "sscl": {"num_hard": 5}}[name]
    loss = getattr(functional, f"{name}_loss")

    def step(x):
        return loss(x * 2, key, bank, rng_state=torch.tensor([1, 2]), backend=backend, **settings)

    step(x).backward()
    wanted, x.grad = x.grad, None
    checkpoint(step, x, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(x.grad, wanted)


@each_way
def test_beside_the_loss_checkpoints_are_fine(backend, use_reentrant):
    x, key = batch()
    steps = [Step(PSMLoss(0.2, (32, 8), backend=backend)) for _ in range(2)]
    gradients = []
    for step, apart in zip(steps, (False, True), strict=True):
        for _ in range(2):
            x.grad = None
            if apart:
                query = checkpoint(step.layer, x, use_reentrant=use_reentrant)
            else:
                query = step.layer(x)
            step.criterion(query, key).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    for name, value in steps[0].state_dict().items():
        assert torch.equal(value, steps[1].state_dict()[name]), name


# --- compiled: what a graph holds cannot ask when it is made, only when it runs -------------------


@each_way
@pytest.mark.parametrize("part", ["criterion", "step"])
def test_compiled_inside_a_checkpoint_is_refused(part, use_reentrant):
    step = Step(PSMLoss(0.2, (32, 8), backend="reference"))
    (step.criterion if part == "criterion" else step).compile(backend="aot_eager", fullgraph=True)
    x, key = batch()
    step(x, key).backward()  # the graphs are made where nothing is recomputed
    assert_refused(checkpoint(step, x, key, use_reentrant=use_reentrant), step)


@each_way
def test_a_compiled_checkpoint_is_refused(use_reentrant):
    """The recomputation is part of the compiled backward."""
    step = Step(PSMLoss(0.2, (32, 8), backend="reference"))

    def whole(x, key):
        return checkpoint(step, x, key, use_reentrant=use_reentrant)

    x, key = batch()
    assert_refused(torch.compile(whole)(x, key), step)


def test_compiled_without_a_checkpoint_is_right():
    x, key = batch()
    steps = [Step(PSMLoss(0.2, (32, 8), backend="reference")) for _ in range(2)]
    steps[1].compile(backend="aot_eager_decomp_partition", fullgraph=True)
    gradients = []
    for step in steps:
        for _ in range(2):
            x.grad = None
            step(x, key).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    for name, value in steps[0].state_dict().items():
        torch.testing.assert_close(value, steps[1].state_dict()[name])


def test_the_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.psm_kernels.refuse_recompute, (torch.tensor([1, 2]),))
