"""Triton's kernels run on the CPU as they are compiled for NVIDIA: the PTX for sm_80 and sm_90, an
instruction at a time (tests/ptx), where Triton's interpreter knows neither layouts nor TMA."""

import importlib.util

import cold
import pytest
import torch
from conftest import problem
from cuda_cases import MEAN_ATOL, arguments, assert_agree, biases, widened

from psm_kernels.backends.base import BankPass, Exclude
from psm_kernels.backends.reference import Reference
from psm_kernels.backends.triton import Triton, config
from psm_kernels.weighted import weighted_pass

if importlib.util.find_spec("triton") is None or config.interpreted():
    pytest.skip("needs Triton, and not its interpreter", allow_module_level=True)
from ptx import triton_driver

BF16 = torch.bfloat16
TRITON, REFERENCE = Triton(), Reference()


@pytest.fixture(params=[80, 90], ids=["sm80", "sm90"])
def gpu(request, monkeypatch) -> int:
    triton_driver.install(monkeypatch, request.param)
    return request.param


def both(*problem, **settings) -> tuple[BankPass, BankPass]:
    args = arguments(*problem, **settings)
    return TRITON.bank_pass(*args), REFERENCE.bank_pass(*widened(args))


@pytest.mark.parametrize(
    ("dim", "dtype", "selection", "topk"),
    [
        (64, BF16, "bernoulli", 5),
        (128, BF16, "bernoulli", 5),
        (128, BF16, "bernoulli", 0),
        (128, torch.float16, "bernoulli", 5),
        (128, BF16, "expected", 5),
        (128, BF16, "all", 5),
        (200, BF16, "bernoulli", 5),
        (256, BF16, "bernoulli", 5),
        (512, BF16, "bernoulli", 5),
        (128, torch.float32, "bernoulli", 5),
    ],
)
def test_bank_pass(gpu, dim, dtype, selection, topk):
    query, key, bank, s_pos = problem(3, 500, dim, dtype=dtype)
    bank[490:] = torch.nan
    got, want = both(
        query, key, bank, s_pos, count=490, topk=topk, selection=selection, col_offset=7
    )
    assert_agree(got, want, dtype)
    assert torch.equal(got.topk_index, want.topk_index)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(64, BF16), (128, BF16), (128, torch.float16), (256, BF16), (64, torch.float32)],
)
def test_a_bias_of_the_slots(gpu, dim, dtype):
    rows, bias = problem(3, 500, dim, dtype=dtype), biases(500, 490)
    bias[5] = torch.nan
    exclude = Exclude(torch.tensor([[5, 40, -1], [5, 5, 99], [-1, 480, 5]]))
    for temperature in (0.2, 0.02):
        got, want = both(
            *rows, count=490, topk=3, selection="all", col_offset=7, temperature=temperature,
            exclude=exclude, slot_bias=bias,
        )  # fmt: skip
        assert_agree(got, want, dtype)
        assert torch.equal(got.neg_count, want.neg_count.float())


def test_it_does_not_matter_when_asynchronous_work_is_done(monkeypatch):
    triton_driver.install(monkeypatch, 90, early=True)
    got, want = both(*problem(70, 700, 128, dtype=BF16))
    assert_agree(got, want, BF16)


def test_exact_products_give_the_same_masks_and_indices(gpu):
    query, key, bank, s_pos = problem(9, 600, 64, dtype=BF16, few_bits=True)
    bank[300:320] = bank[10:30]
    got, want = both(query, key, bank, s_pos, a=8.0, b=0.0, topk=20)
    assert torch.equal(got.neg_count, want.neg_count.float())
    assert torch.equal(got.topk_index, want.topk_index)


@pytest.mark.parametrize(
    ("k", "dim", "dtype"),
    [(7, 128, BF16), (40, 64, BF16), (9, 384, BF16), (9, 64, torch.float32)],
)
def test_bank_topk(gpu, k, dim, dtype):
    _, key, bank, _ = problem(3, 300, dim, dtype=dtype)
    bank[290:] = torch.nan
    key, count = key.to(dtype), torch.tensor(290)
    sim, index = TRITON.bank_topk(key, bank, k, count)
    want = REFERENCE.bank_topk(key.double(), bank.double(), k, count)
    torch.testing.assert_close(sim.double(), want[0], atol=1e-6, rtol=1e-5)
    assert (index == want[1]).float().mean() > 0.99


@pytest.mark.parametrize("ids", [False, True])
def test_the_best_of_many(gpu, ids):
    """1,300 slots of which most tie, more than one chunk takes; some are hidden."""
    _, key, bank, _ = problem(2, 1300, 64, dtype=BF16, few_bits=True)
    bank[:] = bank[torch.arange(1300) % 7]
    key, count = key.to(BF16), torch.tensor(1290)
    exclude = Exclude(torch.tensor([[3, 1288, -1], [7, 7, 2000]]))
    if ids:
        names = torch.arange(1300) % 50 - 2
        exclude = Exclude(exclude.slots, torch.tensor([5, -2]), names)
    sim, index = TRITON.bank_topk(key, bank, 300, count, exclude)
    want = REFERENCE.bank_topk(key.double(), bank.double(), 300, count, exclude)
    assert torch.equal(sim.double(), want[0])
    assert torch.equal(index, want[1])


def test_weighted_pass(gpu):
    query, _, bank, _ = problem(5, 300, 128, dtype=BF16)
    draw = torch.Generator().manual_seed(1)
    affine, rho = torch.rand(5, 5, generator=draw) - 0.3, torch.rand(300, generator=draw)
    affine[3] = (query.to(BF16).float() @ bank.float().T).max(1).values
    args = (query.to(BF16), bank, torch.tensor(290), 0.3, affine, rho)
    got = TRITON.weighted_pass(*args)
    names = ("alpha", "beta", "gamma", "top", "cap")
    want = weighted_pass(
        args[0].double(), bank.double(), 290, temperature=0.3, rho=rho.double(),
        **dict(zip(names, affine.double(), strict=True)), backend="reference",
    )  # fmt: skip
    for a, b, atol in zip(got, want, (1e-5, MEAN_ATOL[BF16], 1e-4), strict=True):
        torch.testing.assert_close(a.double(), b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("selection", ["bernoulli", "all"])
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("ids", [False, True])
def test_what_is_hidden(gpu, ids, dim, selection):
    """Listed slots in some tiles; with ids, every slot is compared."""
    query, key, bank, s_pos = problem(3, 700, dim, dtype=BF16)
    draw = torch.Generator().manual_seed(1)
    exclude = Exclude(torch.randint(-1, 705, (3, 2), generator=draw))
    if ids:
        names = torch.randint(0, 9, (703,), generator=draw) - 2
        exclude = Exclude(exclude.slots, names[:3].contiguous(), names[3:].contiguous())
    got, want = both(
        query, key, bank, s_pos, selection=selection, col_offset=7,
        exclude=exclude, exclude_mined=True,
    )  # fmt: skip
    assert_agree(got, want, BF16)
    assert torch.equal(got.topk_index, want.topk_index)


@pytest.mark.parametrize("soft_weights", ["attention", "uniform", "binary"])
@pytest.mark.parametrize("topk", [0, 5])
def test_psm_step(gpu, soft_weights, topk):
    p, settings = cold.problem(size=230), {"topk": topk, "soft_weights": soft_weights}
    settings |= {"temperature": 0.3, "a": 2.0, "b": -0.1, "hard_weight": 0.6}
    loss, gradient = cold.step(TRITON, p._replace(query=3 * p.query), BF16, **settings)
    cold.assert_step((loss, 3 * gradient), cold.answer(p, **settings), BF16)


def test_small_losses_keep_their_digits(gpu):
    p = cold.problem(batch=3, size=40, nearer=False)
    p = p._replace(key=p.query)
    settings = {"temperature": 0.036, "topk": 0, "selection": "all", "hard_weight": 0.0}
    want, _ = cold.answer(p, **settings)
    assert 3e-7 < want.min() < want.max() < 3e-6
    cold.assert_close("loss", cold.step(TRITON, p, BF16, **settings)[0], want, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("selection", ["bernoulli", "expected"])
def test_cold_temperatures(gpu, selection, dtype):
    p, settings = cold.problem(size=230), {"selection": selection, "temperature": 0.02}
    cold.assert_step(cold.step(TRITON, p, dtype, **settings), cold.answer(p, **settings), dtype)
