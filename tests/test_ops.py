"""Every backend of this machine against the float64 reference. Triton's interpreter and GPUs run
the same cases in test_triton.py."""

import math
from typing import ClassVar

import pytest
import torch
from conftest import problem
from torch.utils._python_dispatch import TorchDispatchMode

from psm_kernels.backends import registry
from psm_kernels.ops import BankPass, bank_pass, bank_topk

LOW = [torch.float32, torch.bfloat16, torch.float16]


def run(query, key, bank, s_pos, *, count=None, backend="reference", **settings):
    settings = {
        "temperature": 0.2,
        "selection": "bernoulli",
        "a": 2.0,
        "b": -0.1,
        "topk": 5,
        "rng_state": torch.tensor([11, 5]),
        **settings,
    }
    key = key if settings["topk"] else None
    return bank_pass(query, key, bank, count, s_pos, backend=backend, **settings)


def truth(query, key, bank, s_pos, **settings) -> BankPass:
    """The reference in float64 on what the backend sees: rounded queries and rows."""
    query, key = query.to(bank.dtype).double(), key.to(bank.dtype).double()
    return run(query, key, bank.double(), s_pos, **settings)


def assert_agree(got: BankPass, want: BankPass, *, atol=1e-5, mean_atol=1e-5):
    torch.testing.assert_close(
        got.neg_count.double(), want.neg_count.double(), atol=1e-3, rtol=1e-5
    )
    for name in ("neg_lse", "neg_sq_lse"):
        a, b = getattr(got, name).double(), getattr(want, name).double()
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(
        got.neg_mean.double(), want.neg_mean.double(), atol=mean_atol, rtol=1e-4
    )
    torch.testing.assert_close(got.topk_sim.double(), want.topk_sim.double(), atol=2e-6, rtol=1e-5)


# P in the second product has the bank's dtype: a rounding of 2^-9 per weight in bf16.
MEAN_ATOL = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


def test_golden(golden, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    p = golden.p
    got = bank_pass(
        torch.nn.functional.normalize(golden.query).to(dtype),
        torch.nn.functional.normalize(golden.key).to(dtype) if p["k"] else None,
        golden.bank.to(dtype),
        golden.count,
        golden.s_pos,
        temperature=p["tau"],
        selection=p["selection"],
        a=p["a"],
        b=p["b"],
        topk=p["k"],
        rng_state=golden.rng_state,
        row_offset=p["row_offset"],
        backend=backend,
    )
    tight = (
        {"atol": 1e-12, "rtol": 1e-12} if dtype is torch.float64 else {"atol": 1e-6, "rtol": 1e-5}
    )
    found = golden.topk_index.shape[1]
    for name, value in zip(BankPass._fields, got, strict=True):
        value = value[:, :found] if name.startswith("topk") else value
        torch.testing.assert_close(
            value.to(getattr(golden, name).dtype), getattr(golden, name), **tight
        )
    assert (got.topk_index[:, found:] == -1).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "dim", "topk"),
    [  # one of each regime: tails of every block size, K < k, D below and above the padded sizes
        (1, 1, 8, 1),
        (3, 63, 20, 5),
        (3, 1000, 64, 20),
        (257, 130, 128, 0),
        (5, 4097, 200, 5),
        (2, 300, 512, 3),
        (7, 9, 33, 20),
    ],
)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
def test_odd_sizes(backend, batch, size, dim, topk, selection, dtype):
    query, key, bank, s_pos = problem(batch, size, dim, dtype=dtype)
    count = torch.tensor(max(1, size - size // 3))
    settings = {"selection": selection, "topk": topk, "count": count}
    got = run(query, key, bank, s_pos, backend=backend, **settings)
    want = truth(query, key, bank, s_pos, **settings)
    assert_agree(got, want, mean_atol=MEAN_ATOL[dtype])
    again = run(query, key, bank, s_pos, backend=backend, **settings)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_exact_products_give_the_same_masks_and_indices(backend, dtype):
    query, key, bank, s_pos = problem(9, 1500, 64, dtype=dtype, few_bits=True)
    bank[700:720] = bank[10:30]  # duplicates: ties go to the smaller slot
    for a in (0.5, 8.0):
        got = run(query, key, bank, s_pos, a=a, topk=20, backend=backend)
        want = truth(query, key, bank, s_pos, a=a, topk=20)
        assert torch.equal(got.neg_count, want.neg_count.float())
        assert torch.equal(got.topk_index, want.topk_index)
        assert torch.equal(got.topk_sim, want.topk_sim.float())


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_cold_temperature_with_equal_similarities(backend, sign, dtype):
    row = torch.full((16,), 0.25)
    query, bank = row.expand(3, 16).clone(), (sign * row).expand(500, 16).contiguous().to(dtype)
    got = run(query, query, bank, torch.ones(3), temperature=0.02, selection="all", backend=backend)
    assert got.neg_lse.tolist() == pytest.approx([sign * 50 + math.log(500)] * 3, rel=1e-6)
    torch.testing.assert_close(got.neg_mean, bank[:3].float(), atol=1e-3, rtol=1e-3)
    assert got.topk_index.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_slots_beyond_count_may_hold_anything(backend):
    query, key, bank, s_pos = problem(4, 200, 32)
    count = torch.tensor(77)
    want = run(query, key, bank, s_pos, count=count, backend=backend)
    bank[77:] = torch.nan
    got = run(query, key, bank, s_pos, count=count, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
def test_empty_bank(backend, selection):
    query, key, bank, s_pos = problem(4, 20, 32)
    count = torch.tensor(0)
    got = run(query, key, bank, s_pos, count=count, selection=selection, backend=backend)
    assert (got.neg_lse == -torch.inf).all()
    assert (got.neg_sq_lse == -torch.inf).all()
    assert not got.neg_mean.any()
    assert not got.neg_count.any()
    assert (got.topk_sim == -torch.inf).all()
    assert (got.topk_index == -1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_a_bad_row_spoils_itself_alone(backend, bad, where):
    query, key, bank, s_pos = problem(6, 150, 32)
    want = run(query, key, bank, s_pos, backend=backend)
    (query if where == "query" else key)[2, 7] = bad
    got = run(query, key, bank, s_pos, backend=backend)
    others = torch.tensor([0, 1, 3, 4, 5])
    for name, a, b in zip(want._fields, got, want, strict=True):
        if name == "neg_mean":  # the order of its sum may depend on what a neighbor keeps
            torch.testing.assert_close(a[others], b[others], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(a[others], b[others]), name
    assert got.topk_index.min() >= -1
    assert got.topk_index.max() < 150
    if where == "query":
        assert not got.neg_lse[2].isfinite()


def test_offsets_are_global(backend):
    """A part of the rows and slots, with its offsets, draws what the whole drew."""
    query, key, bank, s_pos = problem(8, 300, 16, few_bits=True)
    whole = run(query, key, bank, s_pos, backend=backend)
    for start in (0, 48, 113):  # 113: inside a group of 16
        half = run(
            query[3:],
            key[3:],
            bank[start:],
            s_pos[3:],
            row_offset=3,
            col_offset=start,
            backend=backend,
        )
        rest = run(query, key, bank[:start], s_pos, backend=backend) if start else None
        left = whole.neg_count[3:] - (rest.neg_count[3:] if start else 0)
        assert torch.equal(half.neg_count, left)


def test_inputs_are_not_written(backend):
    inputs = problem(5, 100, 24)
    copies = [t.clone() for t in inputs]
    count, rng_state = torch.tensor(90), torch.tensor([1, 2])
    run(*inputs, count=count, rng_state=rng_state, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert (int(count), rng_state.tolist()) == (90, [1, 2])


def test_default_dtype_and_device_do_not_matter(backend):
    inputs = problem(5, 100, 24)
    want = run(*inputs, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = run(*inputs, rng_state=torch.tensor([11, 5], device="cpu"), backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradient_is_the_mean_over_tau(backend):
    query, key, bank, s_pos = problem(5, 100, 24)
    query.requires_grad_()
    out = run(query, key, bank, s_pos, backend=backend)
    assert [t.requires_grad for t in out] == [True] + [False] * 5
    weight = torch.randn(5)
    (out.neg_lse * weight).sum().backward()
    torch.testing.assert_close(query.grad, weight[:, None] * out.neg_mean / 0.2)


def test_gradcheck():
    query, key, bank, s_pos = (t.double() for t in problem(3, 40, 7))
    query.requires_grad_()
    for selection in ("all", "bernoulli"):
        assert torch.autograd.gradcheck(
            lambda q, s=selection: run(q, key, bank, s_pos, selection=s).neg_lse, (query,)
        )


def test_a_backward_fills_no_tensors_for_outputs_without_gradient():
    """On a GPU each would be a launch, five for every loss."""
    query, key, bank, s_pos = problem(3, 40, 8)
    out = run(query.requires_grad_(), key, bank, s_pos)

    class Noted(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Noted():
        out.neg_lse.sum().backward()
    assert "aten.mul.Tensor" in Noted.seen
    assert "aten.zeros.default" not in Noted.seen


@pytest.mark.parametrize(("k", "count"), [(1, 500), (7, 500), (64, 500), (200, 500), (20, 11)])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_topk(backend, k, count, dtype):
    query, _, bank, _ = problem(9, 500, 64, dtype=dtype, few_bits=True)
    bank[250:] = bank[:250].clone()
    similarity, index = bank_topk(query, bank, k, count=count, backend=backend)
    scores = (query.double() @ bank.double().T)[:, :count]
    want, where = scores.sort(dim=1, descending=True, stable=True)
    n = min(k, count)
    assert torch.equal(similarity[:, :n].double(), want[:, :n])
    assert torch.equal(index[:, :n], where[:, :n])
    assert (index[:, n:] == -1).all()
    assert (similarity[:, n:] == -torch.inf).all()


def test_topk_zero(backend):
    query, _, bank, _ = problem(3, 10, 16)
    similarity, index = bank_topk(query, bank, 0, backend=backend)
    assert similarity.shape == index.shape == (3, 0)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_sorted_bank(backend, order):
    """Banks sorted by similarity break kernels that guess thresholds from a part of the bank."""
    query, key, bank, s_pos = problem(1, 3000, 32)
    by = (key @ bank.T)[0].argsort(descending=order == "descending")
    bank = bank[by].contiguous()
    got = run(query, key, bank, s_pos, topk=20, backend=backend)
    want = truth(query, key, bank, s_pos, topk=20)
    assert torch.equal(got.topk_index, want.topk_index)
    assert_agree(got, want)


def test_opcheck():
    query, key, bank, s_pos = problem(3, 20, 8)
    query.requires_grad_()
    state, count = torch.tensor([1, 2]), torch.tensor(15)
    args = (query, key, bank, count, s_pos, 0.2, "bernoulli", 0.5, 0.0, 2, state, 0, 0, "reference")
    torch.library.opcheck(torch.ops.psm_kernels.bank_pass, args)
    torch.library.opcheck(torch.ops.psm_kernels.bank_topk, (query.detach(), bank, 3, count, "auto"))


def test_compiled_pass_and_gradient_equal_eager(backend):
    query, key, bank, s_pos = problem(5, 100, 16)
    count = torch.tensor(100)

    def step(q):
        return run(q, key, bank, s_pos, count=count, backend=backend)

    eager_q, compiled_q = query.clone().requires_grad_(), query.clone().requires_grad_()
    eager, compiled = step(eager_q), torch.compile(step, fullgraph=True)(compiled_q)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    eager.neg_lse.sum().backward()
    compiled.neg_lse.sum().backward()
    torch.testing.assert_close(eager_q.grad, compiled_q.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(5)}, "query: got shape"),
        ({"query": torch.ones(5, 9)}, "query: got shape"),
        ({"query": torch.ones(5, 8, dtype=torch.int32)}, "query: got dtype"),
        ({"query": torch.ones(5, 8, device="meta")}, "query: got device"),
        ({"key": None}, "key: got None"),
        ({"key": torch.ones(4, 8)}, "key: got shape"),
        ({"bank": torch.ones(20, 8, dtype=torch.int8)}, "bank: got dtype"),
        ({"bank": torch.ones(8, 20).T}, "bank: got strides"),
        ({"bank": torch.ones(0, 8)}, "bank: got shape"),
        ({"count": 21}, "count: got 21"),
        ({"count": torch.tensor(3, dtype=torch.int32)}, "count: got"),
        ({"count": torch.tensor([3])}, "count: got"),
        ({"s_pos": torch.ones(4)}, "s_pos: got"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"selection": "some"}, "selection: got 'some'"),
        ({"a": -1.0}, "a: got -1.0"),
        ({"a": float("inf")}, "a: got inf"),
        ({"b": float("nan")}, "b: got nan"),
        ({"topk": -1}, "topk: got -1"),
        ({"topk": 2.0}, "topk: got 2.0"),
        ({"rng_state": None}, "rng_state: got"),
        ({"rng_state": torch.zeros(2)}, "rng_state: got dtype"),
        ({"backend": "cublas"}, "backend: got 'cublas'"),
    ],
)
def test_bad_input(change, message):
    query, key, bank, s_pos = problem(5, 20, 8)
    settings = {"query": query, "key": key, "bank": bank, "count": None, "s_pos": s_pos}
    settings |= {"temperature": 0.2, "selection": "bernoulli", "topk": 2}
    settings |= {"rng_state": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match=f"^{message}.*wanted"):
        bank_pass(**(settings | change))


def test_a_named_backend_that_cannot_run_says_why_and_which_can():
    bank = torch.ones(4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'cpp' cannot run.*float64.*these can: reference"):
        bank_topk(bank, bank, 1, backend="cpp")
    assert registry.choose("auto", bank).name == "reference"
