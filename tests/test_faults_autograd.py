"""What the fused passes cannot do for autograd is an error, and what is given is right."""

import pytest
import torch
import torch.distributed as dist
from conftest import problem
from formulas import expected_unremix
from torch.autograd import forward_ad, gradgradcheck

from psm_kernels import InfoNCELoss, MemoryBank, PSMLoss, SSCLLoss, functional, ops
from psm_kernels.backends import registry
from psm_kernels.bank import Shard, view_of
from psm_kernels.options import SELECTIONS, PassOptions
from psm_kernels.training.checkpoint import full_state_dict
from psm_kernels.weighted import row_ranges, weighted_pass

BANK_LOSSES = ("psm", "info_nce", "hcl", "sscl", "unremix", "supcon", "ressl")
NO_SUMS = ("nnclr", "msf")  # they mine alone: what has a gradient is plain torch


def double(batch=4, size=24, dim=6):
    return [t.double() for t in problem(batch, size, dim, seed=5)[:3]]


def step(name, key, bank, backend, **settings):
    """query -> loss, without state."""
    if name in ("psm", "sscl"):
        settings["rng_state"] = torch.tensor([3, 4])
    if name == "sscl":
        settings["num_hard"] = 5
    if name == "supcon":
        settings |= {"labels": torch.arange(len(key)) % 3, "bank_labels": torch.arange(24) % 3}
    if name == "msf":
        del settings["temperature"]
    loss = getattr(functional, f"{name}_loss")
    return lambda q: loss(q, key, bank, backend=backend, **settings)


def derivatives(function, query):
    """Gradient, and the gradient of its square norm."""
    query = query.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(function(query), query, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), query)
    return first.detach(), second


# --- second derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "form"),
    [
        ("info_nce", {}, "bank"),
        ("info_nce", {}, "batch"),
        ("hcl", {}, "bank"),
        ("hcl", {}, "batch"),
        ("hcl", {"beta": 0.0}, "bank"),
        ("sscl", {}, "bank"),  # in the batch its synthetic rows are constants that would move
        ("sscl", {"mix": "none"}, "bank"),
    ],
)
def test_reference_is_right_by_finite_differences(name, settings, form):
    query, key, bank = double()
    rows = bank if form == "bank" else None
    function = step(name, key, rows, "reference", temperature=0.3, **settings)
    assert gradgradcheck(function, query.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("selection", ["all", "bernoulli"])
@pytest.mark.parametrize("soft_weights", ["attention", "uniform"])
@pytest.mark.parametrize("negatives", ["bank", "neighbors"])
def test_reference_is_right_for_psm(selection, soft_weights, negatives):
    query, key, bank = double()
    function = step(
        "psm", key, bank, "reference", temperature=0.3, topk=3, selection=selection,
        soft_weights=soft_weights, negatives=negatives, count=20,
    )  # fmt: skip
    assert gradgradcheck(function, query.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("form", ["bank", "batch"])
def test_reference_is_right_for_unremix(form):
    """Its weights are constants of the gradient, so finite differences would see more."""
    query, key, bank = double()
    rows = bank if form == "bank" else None
    got = derivatives(step("unremix", key, rows, "reference", temperature=0.3), query)
    wanted = derivatives(lambda q: expected_unremix(q, key, rows, temperature=0.3), query)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_reference_pass_is_right_with_empty_rows(selection):
    query, key, bank = double()
    slots = torch.full((4, 24), -1)
    slots[1] = torch.arange(24)  # this row sees nothing
    state = torch.tensor([3, 4])

    def function(q):
        lse = ops.bank_pass(
            q, key, bank, 20, (q * key).sum(1), temperature=0.3, selection=selection,
            topk=2, exclude=slots, rng_state=state, backend="reference",
        ).neg_lse  # fmt: skip
        return torch.where(lse == -torch.inf, 0.0, lse).sum()

    if selection != "expected":  # there p is a constant, which finite differences would move
        assert gradgradcheck(function, query.requires_grad_(), fast_mode=True)
    first, second = derivatives(function, query)
    for gradient in (first, second):
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()
        assert (gradient[0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_rounds_no_gradient_to_the_bank(dtype):
    """The pass reads a rounded query; both derivatives are those at that point, in fp32."""
    query, key, bank, _ = problem(4, 24, 16, seed=5)
    low = bank.to(dtype)
    got = derivatives(step("info_nce", key, low, "reference", temperature=0.3), query)
    wide = step("info_nce", key.double(), low.double(), "reference", temperature=0.3)
    for a, b in zip(got, derivatives(wide, query.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-3)
        rounded = a.to(dtype).float()
        assert not torch.equal(a, rounded)


@pytest.fixture(params=["own", "emulated"])
def fused(request, backend, monkeypatch):
    """A backend whose gradient comes with the loss; the reference can do as if it were one."""
    if request.param == "own" and backend == "reference":
        pytest.skip("autograd differentiates it")
    if request.param == "emulated":
        if backend != "reference":
            pytest.skip("has the gradient of its own")
        monkeypatch.setattr(registry.TABLE["reference"], "differentiable", False)
    return backend


@pytest.mark.parametrize("name", BANK_LOSSES)
def test_others_refuse_the_second_derivative_alone(fused, name):
    query, key, bank, _ = problem(4, 24, 6, seed=5)
    function = step(name, key, bank, fused, temperature=0.3)
    query.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)

    (plain,) = torch.autograd.grad(function(query), query)
    loss = scale * function(query)
    (first,) = torch.autograd.grad(loss, query, create_graph=True)
    torch.testing.assert_close(first.detach(), 2 * plain)
    penalty = first.square().sum()
    # What is known of the gradient can be used: it is linear in the scale.
    (by_scale,) = torch.autograd.grad(penalty, scale, retain_graph=True)
    torch.testing.assert_close(by_scale, 4 * plain.square().sum())
    with pytest.raises(RuntimeError, match=r"second derivatives: .*backend='reference'"):
        torch.autograd.grad(penalty, query, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives: .*backend='reference'"):
        (loss + penalty).backward()


@pytest.mark.parametrize("name", BANK_LOSSES)
def test_within_the_batch_the_matrix_has_every_derivative(name):
    """Of small batches, on "auto"; passes over the views have one, and none in float64."""
    if name in ("psm", "supcon", "ressl"):
        pytest.skip("has no form without a bank")
    query, key, _ = double()
    got, wanted = (
        derivatives(step(name, key, None, backend, temperature=0.3), query)
        for backend in ("auto", "reference")
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    if name != "unremix":
        with pytest.raises(ValueError, match=r"^backend: 'cpp' cannot run"):
            step(name, key, None, "cpp", temperature=0.3)(query)


@pytest.mark.parametrize("name", NO_SUMS)
def test_what_only_mines_has_every_derivative(backend, name):
    query, key, bank, _ = problem(4, 24, 6, seed=5)
    got = derivatives(step(name, key, bank, backend, temperature=0.3), query)
    wide = step(name, key.double(), bank.double(), "reference", temperature=0.3)
    for a, b in zip(got, derivatives(wide, query.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def refused(neg_lse, query):
    (gradient,) = torch.autograd.grad(neg_lse.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_operators_refuse_the_second_derivative(fused):
    query, _, bank, s_pos = problem(4, 24, 6)
    query.requires_grad_()
    refused(
        ops.bank_pass(query, None, bank, 20, s_pos, temperature=0.3, backend=fused).neg_lse, query
    )
    rows = dict.fromkeys(("alpha", "beta", "gamma", "top", "cap"), torch.ones(4))
    settings = {"temperature": 0.3, "rho": torch.ones(24), "backend": fused}
    refused(weighted_pass(query, bank, 20, **rows, **settings).log_sum, query)


def test_registered_operators_refuse_the_second_derivative():
    """As a graph holds them: without the eager path that autograd sees through."""
    query, _, bank, s_pos = problem(4, 24, 6)
    query.requires_grad_()
    count = torch.tensor(20)
    refused(
        torch.ops.psm_kernels.bank_pass(
            query, None, bank, count, s_pos, 0.3, "all", 0.5, 0.0, 0, None, 0, 0,
            "reference",
        )[0],
        query,
    )  # fmt: skip
    five = [torch.ones(4)] * 5
    refused(
        torch.ops.psm_kernels.weighted_pass(
            query, bank, count, 0.3, *five, torch.ones(24), "reference"
        )[0],
        query,
    )


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_compiled_refuses_the_second_derivative(how):
    query, key, bank, _ = problem(4, 24, 6)
    function = torch.compile(step("info_nce", key, bank, "reference"), backend=how)
    query.requires_grad_()
    (gradient,) = torch.autograd.grad(function(query), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives|double backward"):
        gradient.sum().backward()


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_shard_refuses_the_second_derivative():
    query, _, bank, s_pos = problem(4, 24, 6)
    shard = Shard(torch.cat((bank, bank[:1])), 24, None)
    query.requires_grad_()
    views = [view_of(b, 24, None, None, "reference") for b in (bank, shard)]
    whole, divided = (v.scan(query, None, s_pos, PassOptions(0.3)).neg_lse for v in views)
    torch.testing.assert_close(divided, whole)
    gradients = [torch.autograd.grad(x.sum(), query, retain_graph=True) for x in (divided, whole)]
    torch.testing.assert_close(*gradients)
    refused(divided, query)


def test_a_query_that_is_written_later_keeps_its_gradient(fused):
    """The backward needs none of its values."""
    query, key, bank, _ = problem(4, 24, 6)
    query.requires_grad_()
    leaf = query * 1
    loss = ops.bank_pass(leaf, key, bank, None, (leaf * key).sum(1), temperature=0.3, backend=fused)
    (wanted,) = torch.autograd.grad(loss.neg_lse.sum(), query, retain_graph=True)
    with torch.no_grad():
        leaf.zero_()
    assert torch.equal(torch.autograd.grad(loss.neg_lse.sum(), query)[0], wanted)


# --- tracing and transforms ----------------------------------------------------------------------


def modules(backend):
    psm, sscl = PSMLoss(0.2, (24, 6), backend=backend), SSCLLoss(0.2, 0, num_hard=3)
    psm.enqueue(torch.randn(20, 6))
    return {"psm": psm, "info_nce": InfoNCELoss(0.2, (24, 6), backend=backend), "sscl": sscl}


@pytest.mark.parametrize("name", ["psm", "info_nce", "sscl"])
def test_jit_trace_names_the_way_out(backend, name):
    criterion = modules(backend)[name]
    before = {key: value.clone() for key, value in criterion.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace: .*torch\.compile or torch\.export"):
        torch.jit.trace(criterion, (torch.randn(4, 6), torch.randn(4, 6)))
    for key, value in criterion.state_dict().items():
        assert torch.equal(value, before[key])


def calls(backend):
    query, key, bank, s_pos = problem(4, 24, 6)
    state = torch.tensor([1, 2])
    functions = {name: step(name, key, bank, backend, temperature=0.3) for name in BANK_LOSSES}
    functions["bank_pass"] = lambda q: ops.bank_pass(
        q, None, bank, None, s_pos, temperature=0.3, backend=backend
    ).neg_lse.sum()
    functions["bank_topk"] = lambda q: ops.bank_topk(q, bank, 2, backend=backend)[0].sum()
    criterion = modules(backend)["psm"]
    functions["module"] = lambda q: criterion(q, key)
    functions["key"] = lambda k: functional.psm_loss(
        query, k, bank, rng_state=state, backend=backend
    )
    functions["row_ranges"] = lambda q: row_ranges(
        q, bank, None, temperature=0.3, backend=backend
    ).rest.sum()
    return query, functions


NAMES = (*BANK_LOSSES, "bank_pass", "bank_topk", "module", "key", "row_ranges")


@pytest.mark.parametrize("name", NAMES)
def test_transforms_name_the_way_out(backend, name):
    query, functions = calls(backend)
    function = functions[name]
    func = torch.func
    for transformed in (
        lambda: func.vmap(function, randomness="different")(query.expand(3, -1, -1).clone()),
        lambda: func.grad(function)(query),
        lambda: func.jvp(function, (query,), (query,)),
        lambda: func.hessian(function)(query),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func: .*\(B, D\).*torch\.autograd"):
            transformed()


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(backend, name):
    query, functions = calls(backend)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, query)
        with pytest.raises(RuntimeError, match=r"forward-mode AD: .*torch\.autograd\.grad"):
            functions[name](dual)
        functions[name](query)  # a plain one is none of its affairs


def test_compiled_transforms_are_right_or_refused():
    query, key, bank, _ = problem(4, 24, 6)
    function = step("info_nce", key, bank, "reference")
    many = torch.stack((query, key, query + key))
    got = torch.compile(torch.vmap(function), backend="aot_eager")(many)
    torch.testing.assert_close(got, torch.stack([function(x) for x in many]))
    with pytest.raises(RuntimeError, match=r"torch\.func|functorch"):
        torch.compile(torch.func.grad(function), backend="aot_eager")(query)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager")
    compiled(query)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="forward-mode AD"),
    ):
        compiled(forward_ad.make_dual(query, query))


def test_transforms_within_the_batch_are_right():
    """Plain torch: there is nothing to refuse."""
    query, key, _ = double()
    function = step("info_nce", key, None, "reference")
    got = torch.func.grad(function)(query)
    wanted, _ = derivatives(function, query)
    torch.testing.assert_close(got, wanted)


# --- a sharded state_dict ------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_a_plain_module_names_full_state_dict():
    sharded = PSMLoss(0.2, (24, 6), shard_bank=True, backend="reference")
    sharded.enqueue(torch.randn(20, 6))
    plain = PSMLoss(0.2, (24, 6))
    for target, state in (
        (plain, sharded.state_dict()),
        (torch.nn.ModuleList([plain]), torch.nn.ModuleList([sharded]).state_dict()),
        (MemoryBank(24, 6), sharded.memory_bank.state_dict()),
    ):
        with pytest.raises(ValueError, match=r"psm_kernels\.training\.checkpoint\.full_state_dict"):
            target.load_state_dict(state)
    assert int(plain.memory_bank.count) == 0
    plain.load_state_dict(full_state_dict(sharded))
    assert torch.equal(plain.memory_bank.bank, sharded.state_dict()["memory_bank.bank"].to_local())
    sharded.load_state_dict(sharded.state_dict())
