"""CLIP's loss against cross entropy on the matrix in float64, on one rank and on several."""

import pytest
import torch
from ranks import DIM, WORLDS, unit

from psm_kernels import CLIPLoss
from psm_kernels.functional import clip_loss

SCALES = [2.0, 14.3, 100.0]


def expected(query, key, scale, ids=None):
    """Losses (B,) of rows of any length."""
    query, key = (torch.nn.functional.normalize(x, dim=1) for x in (query, key))
    logits = scale * query @ key.T
    if ids is not None:
        copies = (ids[:, None] == ids) & (ids >= 0)
        logits = logits.masked_fill(copies.fill_diagonal_(False), -torch.inf)
    target = torch.arange(len(query))
    both = (torch.nn.functional.cross_entropy(x, target, reduction="none")
            for x in (logits, logits.T))  # fmt: skip
    return sum(both) / 2


def pairs(batch, dim, scale, seed=0):
    """query, key and scale in float64, exact in float32; the positives are near."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(batch, dim, generator=g)
    query, key = (shared + torch.randn(batch, dim, generator=g) for _ in range(2))
    inputs = (query, 3 * key, torch.tensor(scale))
    return [x.double().requires_grad_() for x in inputs]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("batch", "dim"), [(1, 5), (2, 8), (37, 33), (130, 64)])
def test_loss_and_all_three_gradients(backend, batch, dim, scale, with_ids):
    wide = pairs(batch, dim, scale)
    ids = torch.arange(batch) // 2 - 1 if with_ids else None
    want = expected(*wide, ids).mean()
    inputs = [x.detach().float().requires_grad_() for x in wide]
    got = clip_loss(*inputs[:2], logit_scale=inputs[2], ids=ids, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(got, inputs), torch.autograd.grad(want, wide)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=2e-5 * max(1, b.abs().max()))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_reductions_and_a_scale_that_is_a_number(reduction):
    query, key, _ = pairs(9, 8, 1.0)
    got = CLIPLoss(reduction=reduction)(query, key, 7.0)
    want = expected(query, key, 7.0)
    torch.testing.assert_close(got, want if reduction == "none" else want.sum())


def test_float64_has_second_derivatives():
    query, key, scale = pairs(4, 5, 3.0)
    run = lambda q, k, s: clip_loss(q, k, logit_scale=s)  # noqa: E731
    assert torch.autograd.gradcheck(run, (query, key, scale))
    assert torch.autograd.gradgradcheck(run, (query, key, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_its_rows(dtype):
    query, key, _ = (x.detach() for x in pairs(40, 16, 1.0))
    rows = [x.to(dtype).requires_grad_() for x in (query, key)]
    wide = [x.detach().double().requires_grad_() for x in rows]
    got, want = clip_loss(*rows, logit_scale=20.0, backend="cpp"), expected(*wide, 20.0).mean()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(got, rows), torch.autograd.grad(want, wide)
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=1e-2 * b.abs().max().item())


def test_compiles_whole():
    inputs = [x.detach().float().requires_grad_() for x in pairs(20, 8, 9.0)]
    ids = torch.arange(20) // 2

    def run(query, key, scale):
        return clip_loss(query, key, logit_scale=scale, ids=ids, backend="cpp")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = [(loss := f(*inputs), *torch.autograd.grad(loss, inputs)) for f in (run, compiled)]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_scale": 0.0}, "^logit_scale: got 0.0"),
        ({"logit_scale": torch.ones(1)}, r"^logit_scale: got shape \(1,\)"),
        ({"logit_scale": torch.tensor(3)}, "^logit_scale: got shape .*int64"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "^ids: got"),
        ({"ids": torch.zeros(4)}, "^ids: got dtype"),
        ({"reduction": "most"}, "^reduction: got 'most'"),
        ({"backend": "fast"}, "^backend: got 'fast'"),
        ({"key": torch.zeros(4, 6)}, "^key: got"),
    ],
)
def test_bad_input(change, message):
    arguments = {"query": torch.zeros(4, 5), "key": torch.zeros(4, 5), "logit_scale": 1.0} | change
    with pytest.raises(ValueError, match=message):
        clip_loss(arguments.pop("query"), arguments.pop("key"), **arguments)


# --- several ranks -------------------------------------------------------------------------------


def on_a_rank(at, batch, with_ids, backend):
    query, key = (at.own(unit(batch, seed)).requires_grad_() for seed in (1, 2))
    query, key = (x.to(torch.float32 if backend == "cpp" else x.dtype) for x in (query, key))
    query, key = (x.detach().requires_grad_() for x in (query, key))
    scale = torch.tensor(5.0, dtype=query.dtype, requires_grad=True)
    ids = at.own(torch.arange(batch) // 3) if with_ids else None
    criterion = CLIPLoss(gather_distributed=True, process_group=at.group, backend=backend)
    loss = criterion(query, key, scale, ids=ids)
    return loss.detach(), *torch.autograd.grad(loss, (query, key, scale))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_ranks_have_what_one_process_has(pool, world, with_ids, backend):
    """The mean over ranks, which DDP makes of their gradients, is that of the whole batch."""
    batch = 12
    loss, of_query, of_key, of_scale = zip(
        *pool.run(on_a_rank, world, batch, with_ids, backend), strict=True
    )
    query, key = unit(batch, 1).requires_grad_(), unit(batch, 2).requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    want = expected(query, key, scale, torch.arange(batch) // 3 if with_ids else None).mean()
    wanted = torch.autograd.grad(want, (query, key, scale))
    close = {"rtol": 1e-4, "atol": 1e-6} if backend == "cpp" else {}
    torch.testing.assert_close(sum(loss).double() / world, want, **close)
    got = torch.cat(of_query) / world, torch.cat(of_key) / world, sum(of_scale) / world
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, **close)


def unequal(at, what):
    batch = 3 + (what == "batch") * at.rank
    scale = -1.0 if what == "scale" and at.rank else 1.0
    ids = torch.zeros(batch, dtype=torch.int64) if what == "ids" and at.rank else None
    rows = torch.ones(batch, DIM)
    return clip_loss(
        rows, rows, logit_scale=scale, ids=ids, gather_distributed=True, process_group=at.group
    )


@pytest.mark.parametrize(
    ("what", "message"),
    [("batch", "batch size: got"), ("ids", "ids: got"), ("scale", "logit_scale: got -1")],
)
def test_ranks_that_differ_are_refused_everywhere(pool, what, message):
    errors = pool.refused(unequal, 2, what)
    assert all(message in error for error in errors)


def test_one_process_gathers_nothing():
    query, key, scale = pairs(5, 4, 3.0)
    alone = CLIPLoss()(query, key, scale)
    torch.testing.assert_close(CLIPLoss(gather_distributed=True)(query, key, scale), alone)
    with pytest.raises(ValueError, match="process_group"):
        CLIPLoss(gather_distributed=True, process_group=object())
