"""Every backend's psm_step against the differentiable code in losses/psm.py. Where there is no GPU,
test_triton.py runs this file in Triton's interpreter."""

import pytest
import torch
from conftest import problem

from psm_kernels.backends import registry
from psm_kernels.functional import psm_loss


def _places() -> list:
    able = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        marks = [pytest.mark.gpu] * (device == "cuda")
        bank = torch.zeros(1, 8, device=device)
        for name in registry.TABLE:
            try:
                backend = registry.choose(name, bank)
            except ValueError:
                continue
            if backend.max_step_topk >= 0:
                able.append(pytest.param((name, device), id=f"{name}-{device}", marks=marks))
    return able


@pytest.fixture(params=_places())
def place(request) -> tuple[str, str]:
    return request.param


def inputs(device, *sizes, **options):
    """query, key of any length, bank."""
    query, key, bank, _ = (t.to(device) for t in problem(*sizes, **options))
    return 3 * query, 0.5 * key, bank


def agree(place, query, key, bank, *, rtol=1e-4, atol=1e-5, **settings):
    """Loss and gradient of both ways."""
    name, device = place
    settings = {
        "temperature": 0.2,
        "topk": 5,
        "a": 2.0,
        "b": -0.1,
        "weight_temperature": 0.3,
        "hard_weight": 0.7,
        "rng_state": torch.tensor([11, 5], device=device),
        "row_offset": 3,
        "reduction": "none",
        "backend": name,
        **settings,
    }
    ours, theirs = query.clone().requires_grad_(), query.clone().requires_grad_()
    loss = psm_loss(ours, key, bank, **settings)
    want = psm_loss(theirs, key, bank, return_stats=True, **settings)
    assert type(loss.grad_fn).__name__ == "_KnownBackward"
    torch.testing.assert_close(loss, want.loss, rtol=1e-5, atol=atol, equal_nan=True)
    weight = torch.linspace(0.5, 2, len(query), device=device)
    for rows in (loss, want.loss):
        (rows * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=rtol, atol=atol, equal_nan=True)
    return loss.detach(), ours.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("soft_weights", ["attention", "uniform", "binary"])
@pytest.mark.parametrize(
    ("selection", "topk", "count"),
    [  # nothing, one and many mined; fewer valid slots than wanted; one slot, which is mined
        ("bernoulli", 5, None),
        ("bernoulli", 20, 12),
        ("bernoulli", 0, None),
        ("expected", 20, None),
        ("expected", 1, 100),
        ("all", 5, 3),
        ("all", 1, 1),
        ("all", 5, 0),
    ],
)
def test_loss_and_gradient(place, selection, topk, count, soft_weights, dtype):
    if place == ("triton", "cpu") and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bf16 where chips round")
    query, key, bank = inputs(place[1], 4, 150, 20, dtype=dtype)
    settings = {"selection": selection, "topk": topk, "count": count, "soft_weights": soft_weights}
    agree(place, query, key, bank, **settings)


@pytest.mark.parametrize("selection", ["bernoulli", "expected"])
def test_nothing_kept(place, selection):
    query, key, bank = inputs(place[1], 4, 150, 20)
    agree(place, query, key, bank, selection=selection, b=50.0)
    loss, gradient = agree(place, query, key, bank, selection=selection, b=50.0, topk=0)
    assert not loss.any()
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("selection", ["bernoulli", "all"])
def test_cold_temperature_with_equal_similarities(place, selection, sign):
    row = torch.full((1, 16), 0.25, device=place[1])
    query, bank = row.repeat(3, 1), sign * row.repeat(300, 1)
    settings = {"temperature": 0.02, "selection": selection, "a": 0.1, "topk": 4}
    loss, gradient = agree(place, query, query, bank, atol=2e-4, **settings)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


def test_duplicated_rows(place):
    query, key, bank = inputs(place[1], 5, 400, 16, few_bits=True)
    agree(place, query, key, bank[torch.arange(400) % 7].contiguous(), topk=20)


def test_a_bad_row_spoils_itself_alone(place):
    query, key, bank = inputs(place[1], 6, 150, 20)
    clean = agree(place, query, key, bank)
    query[1, 3], key[2, 0] = torch.nan, torch.inf
    query[4] = 0.0
    spoiled = agree(place, query, key, bank)
    whole = torch.tensor([0, 3, 5], device=place[1])
    for got, want in zip(spoiled, clean, strict=True):
        torch.testing.assert_close(got[whole], want[whole])
        assert got[4].isfinite().all()
        assert not got[1:3].isfinite().any()


def test_layout_and_dtype_of_the_query_do_not_matter(place):
    query, key, bank = inputs(place[1], 6, 150, 20)
    want = agree(place, query, key, bank)
    got = agree(place, query.T.contiguous().T, key.T.contiguous().T, bank)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    half = query.bfloat16().requires_grad_()
    psm_loss(half, key, bank, selection="all", backend=place[0]).backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("hard_weight", [0.0, 1.0])
def test_small_losses_keep_their_digits(place, hard_weight):
    """A loss of 1e-6 beside logits of 9: InfoNCE, and what the hard term adds."""
    draw = torch.Generator().manual_seed(0)
    query, shift = torch.randn(2, 1, 32, generator=draw)
    bank = 0.6 * torch.randn(40, 32, generator=draw) - query  # far from it
    bank = torch.nn.functional.normalize(bank, dim=1)
    key = (query + 0.3 * shift).repeat(4, 1)
    query = query * torch.tensor([[1.0], [0.1], [7.0], [1e-3]])
    leaf = query.double().requires_grad_()
    unit = torch.nn.functional.normalize(leaf, dim=1)
    plus = (unit * torch.nn.functional.normalize(key.double(), dim=1)).sum(1, keepdim=True)
    want = torch.log1p(torch.exp((unit @ bank.double().T - plus) / 0.1).sum(1))
    want = (1 + hard_weight) * want
    assert ((want > 3e-7) & (want < 3e-6)).all()
    want.sum().backward()

    query, key, bank = (x.to(place[1]) for x in (query, key, bank))
    query.requires_grad_()
    loss = psm_loss(
        query, key, bank, temperature=0.1, topk=0, selection="all", hard_weight=hard_weight,
        reduction="none", backend=place[0],
    )  # fmt: skip
    loss.sum().backward()
    torch.testing.assert_close(loss.cpu().double(), want.detach(), rtol=1e-4, atol=0)
    error = (query.grad.cpu().double() - leaf.grad).norm(dim=1) / leaf.grad.norm(dim=1)
    assert (error < 1e-4).all()


def test_more_mined_rows_than_a_step_takes(place, monkeypatch):
    name, device = place
    query, key, bank = inputs(device, 6, 150, 20)
    settings = {"topk": 5, "selection": "all", "backend": name}
    query.requires_grad_()
    want = psm_loss(query, key, bank, reduction="none", **settings)
    monkeypatch.setattr(registry.choose(name, bank), "max_step_topk", 4)
    got = psm_loss(query, key, bank, reduction="none", **settings)
    assert type(got.grad_fn).__name__ != type(want.grad_fn).__name__ == "_KnownBackward"
    torch.testing.assert_close(got, want)


def test_strided_arguments_are_read_as_they_are(place):
    """Kernels see addresses: ids and noise state that are every other element of something."""
    name, device = place
    query, key, bank = inputs(device, 6, 40, 16)
    ids, bank_ids = torch.arange(6, device=device), torch.arange(40, device=device) % 8
    state = torch.tensor([11, 5], device=device)
    settings = {"temperature": 0.2, "topk": 3, "backend": name}

    def apart(x):
        return torch.stack((x, x + 1000), 1)[:, 0]

    wanted = psm_loss(query, key, bank, ids=ids, bank_ids=bank_ids, rng_state=state, **settings)
    named = {"ids": apart(ids), "bank_ids": apart(bank_ids), "rng_state": apart(state)}
    assert torch.equal(psm_loss(query, key, bank, **named, **settings), wanted)
