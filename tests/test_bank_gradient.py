"""`slot_bias`, and the gradient of a pass by its bank, against the formulas in float64."""

import pytest
import torch
from conftest import problem
from torch.profiler import ProfilerActivity, profile

from psm_kernels.backends import registry
from psm_kernels.ops import bank_pass

LOW = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURES = [0.5, 0.07, 0.02]


def expected(query, bank, seen, *, temperature, bias=None):
    """neg_lse by autograd on the matrix, in whatever dtype comes in; seen: (B, K) bool."""
    logits = query @ bank.T / temperature + (0.0 if bias is None else bias)
    lse = torch.logsumexp(torch.where(seen, logits, -torch.inf), 1)
    return torch.where(seen.any(1), lse, -torch.inf), logits


def case(batch, size, dim, dtype, *, seed=0):
    """Rows as a backend reads them: query in fp32, exact in the bank's dtype."""
    query, _, bank, s_pos = problem(batch, size, dim, seed=seed, dtype=dtype)
    g = torch.Generator().manual_seed(seed + 1)
    bias = torch.randn(size, generator=g) * 3
    bias[:: max(2, size // 7)] = -torch.inf
    bias[-1] = 0.5
    return query.to(dtype).float(), bank, s_pos, bias


def both_gradients(lse, query, bank, weight):
    return torch.autograd.grad((lse * weight).sum(), (query, bank))


@pytest.fixture
def oracle(monkeypatch):
    """The reference as if it were a fused backend: its gradient by the bank is the second pass."""
    monkeypatch.setattr(registry.TABLE["reference"], "differentiable", False)
    return "reference"


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "dim"), [(1, 1, 8), (3, 63, 20), (5, 1000, 64), (131, 257, 33), (2, 300, 200)]
)
def test_bias_is_added_to_the_logits(backend, batch, size, dim, dtype, temperature):
    query, bank, s_pos, bias = case(batch, size, dim, dtype)
    count = max(1, size - size // 3)
    bias[count - 1] = 1.0  # something is left
    given = bias.clone()
    given[count:] = torch.nan  # not looked at
    got = bank_pass(
        query, None, bank, count, s_pos, temperature=temperature, slot_bias=given, backend=backend
    )
    kept = (bias > -torch.inf)[:count]
    rows = bank.double()[:count][kept]
    logits = query.double() @ rows.T / temperature + bias.double()[:count][kept]
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(got.neg_lse.double(), logits.logsumexp(1), **close)
    torch.testing.assert_close(got.neg_sq_lse.double(), (2 * logits).logsumexp(1), **close)
    assert (got.neg_count == kept.sum()).all()
    mean_atol = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}[dtype]
    torch.testing.assert_close(
        got.neg_mean.double(), logits.softmax(1) @ rows, rtol=1e-4, atol=2 * mean_atol
    )


def test_no_bias_and_a_bias_of_zeros_are_the_same(backend):
    query, bank, s_pos, _ = case(5, 300, 32, torch.float32)
    settings = {"temperature": 0.1, "backend": backend}
    want = bank_pass(query, None, bank, 250, s_pos, **settings)
    got = bank_pass(query, None, bank, 250, s_pos, slot_bias=torch.zeros(300), **settings)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_bias_with_exclusion_and_mining(backend):
    """What is excluded counts once, whatever its bias; mining is by the key alone."""
    query, bank, s_pos, bias = case(4, 130, 16, torch.float32)
    slots = torch.tensor([[0, 3, -1], [5, 18, 36], [129, 1, 2], [-1, -1, -1]])
    bank_ids, ids = torch.arange(130) % 11, torch.tensor([3, -1, 5, 20])
    bank_ids[77] = -2
    settings = {"temperature": 0.1, "exclude": slots, "ids": ids, "bank_ids": bank_ids}
    key = query.flip(0)
    got, plain = (
        bank_pass(query, key, bank, 120, s_pos, topk=4, slot_bias=b, backend=backend, **settings)
        for b in (bias, None)
    )
    seen = (torch.arange(130) < 120) & (bank_ids != -2) & (bank_ids != ids[:, None])
    seen = seen & ~(torch.arange(130)[None, :, None] == slots[:, None, :]).any(2)
    lse, _ = expected(query.double(), bank.double(), seen, temperature=0.1, bias=bias.double())
    torch.testing.assert_close(got.neg_lse.double(), lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.neg_count, (seen & (bias > -torch.inf)).sum(1).float())
    assert torch.equal(got.topk_index, plain.topk_index)
    assert torch.equal(got.topk_sim, plain.topk_sim)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bias_that_is_no_number_spoils_the_rows_that_see_it(backend, bad):
    query, bank, s_pos, bias = case(3, 100, 16, torch.float32)
    bias[50] = bad
    slots = torch.tensor([[50], [-1], [50]])
    got = bank_pass(
        query, None, bank, None, s_pos, temperature=0.2, slot_bias=bias, exclude=slots,
        backend=backend,
    )  # fmt: skip
    assert got.neg_lse.isfinite().tolist() == [True, False, True]
    assert got.neg_mean.isfinite().all(1).tolist() == [True, False, True]


def test_all_slots_left_out(backend):
    query, bank, s_pos, _ = case(3, 100, 16, torch.float32)
    bias = torch.full((100,), -torch.inf)
    got = bank_pass(
        query, None, bank, None, s_pos, temperature=0.2, slot_bias=bias, backend=backend
    )
    for lse in (got.neg_lse, got.neg_sq_lse):
        assert (lse == -torch.inf).all()
    for zero in (got.neg_count, got.neg_mean):
        assert (zero == 0).all()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("own", [True, False])
def test_gradcheck(request, biased, own):
    """By autograd of the formulas, and by the pass with the roles exchanged."""
    if not own:
        request.getfixturevalue("oracle")
    query, _, bank, s_pos = (t.double() for t in problem(4, 14, 7))
    bias = torch.randn(14, dtype=torch.float64)
    bias[3] = -torch.inf
    ids, bank_ids = torch.tensor([1, -1, 3, 1]), torch.arange(14) % 5 - 1
    bank_ids[6] = -2

    def lse(q, m):
        return bank_pass(
            q, None, m, 11, s_pos, temperature=0.3, slot_bias=bias if biased else None,
            ids=ids, bank_ids=bank_ids, backend="reference",
        ).neg_lse  # fmt: skip

    inputs = (query.requires_grad_(), bank.requires_grad_())
    assert torch.autograd.gradcheck(lse, inputs)
    if own:
        assert torch.autograd.gradgradcheck(lse, inputs)


@pytest.mark.parametrize("signs", ["positive", "negative", "both", "zeros"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_exchanged_pass_is_exact(oracle, temperature, signs):
    query, _, bank, s_pos = (t.double() for t in problem(9, 50, 12, seed=3))
    bias = torch.randn(50, dtype=torch.float64)
    weight = torch.rand(9, dtype=torch.float64) + 0.1
    if signs == "both":
        weight[::2] *= -1
    weight = {"negative": -weight, "zeros": 0 * weight}.get(signs, weight)
    weight[4] = 0.0
    query.requires_grad_(), bank.requires_grad_()
    settings = {"temperature": temperature, "slot_bias": bias, "backend": oracle}
    got = bank_pass(query, None, bank, 41, s_pos, **settings).neg_lse
    seen = (torch.arange(50) < 41).expand(9, 50)
    want, _ = expected(query, bank, seen, temperature=temperature, bias=bias)
    for a, b in zip(*(both_gradients(x, query, bank, weight) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "dim"), [(1, 1, 8), (1, 70, 16), (7, 130, 33), (129, 67, 64), (67, 1000, 128)]
)
def test_gradients_of_both_sides(backend, batch, size, dim, dtype, temperature):
    query, bank, s_pos, bias = case(batch, size, dim, dtype)
    count = max(1, size - size // 5)
    bias[count - 1] = 1.0
    weight = torch.randn(batch, generator=torch.Generator().manual_seed(9))
    if batch > 1:
        weight[1] = 0.0
    query.requires_grad_(), bank.requires_grad_()
    lse = bank_pass(
        query, None, bank, count, s_pos, temperature=temperature, slot_bias=bias, backend=backend
    ).neg_lse
    got = both_gradients(lse, query, bank, weight)
    q, m = (t.detach().double().requires_grad_() for t in (query, bank))
    seen = ((torch.arange(size) < count) & (bias > -torch.inf)).expand(batch, size)
    want, _ = expected(q, m, seen, temperature=temperature, bias=bias.nan_to_num(neginf=0).double())
    want = both_gradients(want, q, m, weight)
    assert got[1].dtype is dtype
    assert (got[1][count:] == 0).all()
    assert (got[1][bias == -torch.inf] == 0).all()
    tolerance = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def in_batch(rows, temperature, backend, lists):
    s_pos = (rows * rows.roll(len(rows) // 2, 0)).sum(1)
    return bank_pass(
        rows, None, rows, None, s_pos.detach(), temperature=temperature, exclude=lists,
        exclude_transposed=lists, backend=backend,
    ).neg_lse  # fmt: skip


@pytest.mark.parametrize("half", [1, 2, 35])
def test_rows_against_themselves(backend, half):
    """SimCLR's: a row sees neither itself nor its other view."""
    rows = torch.nn.functional.normalize(torch.randn(2 * half, 24)).requires_grad_()
    own = torch.arange(2 * half)
    lists = torch.stack((own, own.roll(half)), 1)
    lse = in_batch(rows, 0.1, backend, lists)
    if half == 1:
        assert (lse == -torch.inf).all()
        (got,) = torch.autograd.grad(torch.where(lse.isinf(), 0.0, lse).sum(), rows)
        assert (got == 0).all()
        return
    (got,) = torch.autograd.grad(lse.square().sum(), rows)
    exact = rows.detach().double().requires_grad_()
    seen = ~torch.eye(half, dtype=torch.bool).repeat(2, 2)
    want = expected(exact, exact, seen, temperature=0.1)[0].square().sum()
    (want,) = torch.autograd.grad(want, exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_lists_that_are_not_symmetric(backend):
    """Two towers: `exclude_transposed` says who must not see a slot."""
    query, bank, s_pos, _ = case(5, 12, 16, torch.float32)
    lists = torch.tensor([[0, 3], [0, -1], [99, 7], [7, 0], [11, 2]])
    hidden = (torch.arange(12)[None, :, None] == lists[:, None, :]).any(2)  # (B, K)
    transposed = torch.full((12, 6), -1)
    for slot in range(12):
        rows = hidden[:, slot].nonzero()[:, 0]
        transposed[slot, : len(rows)] = rows
    transposed[4, 5] = 70  # names no row
    query.requires_grad_(), bank.requires_grad_()
    weight = torch.tensor([1.0, -2.0, 0.0, 3.0, -0.5])
    lse = bank_pass(
        query, None, bank, None, s_pos, temperature=0.1, exclude=lists,
        exclude_transposed=transposed, backend=backend,
    ).neg_lse  # fmt: skip
    q, m = (t.detach().double().requires_grad_() for t in (query, bank))
    want, _ = expected(q, m, ~hidden, temperature=0.1)
    for a, b in zip(
        both_gradients(lse, query, bank, weight), both_gradients(want, q, m, weight), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_ids_change_places(backend):
    query, bank, s_pos, bias = case(6, 90, 16, torch.float32)
    ids, bank_ids = torch.tensor([4, -1, 4, 7, 50, -1]), torch.arange(90) % 9 - 1
    bank_ids[[8, 30]] = -2
    seen = (bank_ids != -2) & ((bank_ids != ids[:, None]) | (ids < 0)[:, None])
    query.requires_grad_(), bank.requires_grad_()
    weight = torch.tensor([1.0, -2.0, 0.0, 3.0, -0.5, 1.5])
    lse = bank_pass(
        query, None, bank, None, s_pos, temperature=0.1, slot_bias=bias, ids=ids,
        bank_ids=bank_ids, backend=backend,
    ).neg_lse  # fmt: skip
    q, m = (t.detach().double().requires_grad_() for t in (query, bank))
    want, _ = expected(
        q, m, seen & (bias > -torch.inf), temperature=0.1, bias=bias.nan_to_num(neginf=0).double()
    )
    for a, b in zip(
        both_gradients(lse, query, bank, weight), both_gradients(want, q, m, weight), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_memory_is_not_queries_times_slots(backend):
    """With B K floats = 64 MB, no operation of either direction takes a quarter of that."""
    if backend == "reference":
        pytest.skip("the oracle writes B x K matrices on purpose")
    query, bank, s_pos, bias = case(4096, 4096, 16, torch.float32)
    query.requires_grad_(), bank.requires_grad_()
    settings = {"temperature": 0.1, "slot_bias": bias, "backend": backend}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        bank_pass(query, None, bank, None, s_pos, **settings).neg_lse.square().sum().backward()
    assert max(event.cpu_memory_usage for event in trace.events()) < 16 << 20


@pytest.mark.parametrize("side", ["query", "bank"])
def test_one_side_alone(backend, side):
    query, bank, s_pos, _ = case(5, 40, 16, torch.float32)
    tensor = {"query": query, "bank": bank}[side].requires_grad_()
    out = bank_pass(query, None, bank, 30, s_pos, temperature=0.1, backend=backend)
    assert [t.requires_grad for t in out] == [True] + [False] * 5
    out.neg_lse.sum().backward()
    assert tensor.grad is not None
    with torch.no_grad():
        out = bank_pass(query, None, bank, 30, s_pos, temperature=0.1, backend=backend)
    assert not out.neg_lse.requires_grad


def test_a_bank_without_a_gradient_costs_no_second_pass(oracle, monkeypatch):
    calls = []
    plain = registry.TABLE["reference"].bank_pass

    def noted(query, *args, **more):
        calls.append(len(query))
        return plain(query, *args, **more)

    monkeypatch.setattr(registry.TABLE["reference"], "bank_pass", noted)
    query, bank, s_pos, _ = case(5, 40, 16, torch.float32)
    query.requires_grad_()
    bank_pass(
        query, None, bank, 30, s_pos, temperature=0.1, backend=oracle
    ).neg_lse.sum().backward()
    assert calls == [5]
    bank.requires_grad_()  # of one sign: one pass on a CPU, where asking costs nothing
    bank_pass(
        query, None, bank, 30, s_pos, temperature=0.1, backend=oracle
    ).neg_lse.sum().backward()
    assert calls == [5, 5, 40]


def test_a_row_with_nan_spoils_what_it_touches(backend):
    """Each slot that a bad query sees; one that it does not may get 0 times NaN as well."""
    query, bank, s_pos, _ = case(5, 40, 16, torch.float32)
    query[2] = torch.nan
    query.requires_grad_(), bank.requires_grad_()
    lists = torch.full((5, 1), -1)
    lists[2] = 7
    transposed = torch.full((40, 1), -1)
    transposed[7] = 2
    lse = bank_pass(
        query, None, bank, 30, s_pos, temperature=0.1, exclude=lists,
        exclude_transposed=transposed, backend=backend,
    ).neg_lse  # fmt: skip
    lse.sum().backward()
    assert query.grad.isfinite().all(1).tolist() == [True, True, False, True, True]
    assert bank.grad[:7].isnan().all()
    assert (bank.grad[30:] == 0).all()


def test_second_derivatives_are_refused_unless_autograd_has_them(backend):
    query, bank, s_pos, _ = case(5, 40, 16, torch.float32)
    query.requires_grad_(), bank.requires_grad_()
    lse = bank_pass(query, None, bank, 30, s_pos, temperature=0.1, backend=backend).neg_lse
    (first,) = torch.autograd.grad(lse.sum(), bank, create_graph=True)
    if backend == "reference":
        assert torch.autograd.grad(first.sum(), query)[0].isfinite().all()
        return
    for tensor in (query, bank):
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(first.sum(), tensor, retain_graph=True)


def test_a_bank_that_was_written_before_the_backward_is_refused(oracle):
    query, bank, s_pos, _ = case(5, 40, 16, torch.float32)
    leaf = bank.clone().requires_grad_()
    bank = leaf * 1
    lse = bank_pass(query, None, bank, 30, s_pos, temperature=0.1, backend=oracle).neg_lse
    with torch.no_grad():
        bank.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lse.sum().backward()


def test_opcheck():
    query, bank, s_pos, bias = case(4, 20, 8, torch.float32)
    query.requires_grad_(), bank.requires_grad_()
    lists = torch.full((4, 1), 3)
    transposed = torch.full((20, 4), -1)
    transposed[3] = torch.arange(4)
    count = torch.tensor(15)
    args = (query, None, bank, count, s_pos, 0.2, "all", 0.5, 0.0, 0, None, 0, 0, "reference")
    more = {"exclude": lists, "slot_bias": bias, "exclude_transposed": transposed}
    torch.library.opcheck(torch.ops.psm_kernels.bank_pass, args, more)
    lse = torch.ops.psm_kernels.bank_pass(*args, **more)[0].detach()
    torch.library.opcheck(
        torch.ops.psm_kernels.bank_gradient,
        (0.2, "reference", torch.randn(4), query.detach(), bank.detach(), count, lse, bias),
    )


def test_compiled_equals_eager(backend):
    query, bank, s_pos, bias = case(5, 100, 16, torch.float32)
    lists = torch.full((5, 1), -1)
    transposed = torch.full((100, 1), -1)

    def step(q, m):
        return bank_pass(
            q, None, m, 80, s_pos, temperature=0.1, slot_bias=bias, exclude=lists,
            exclude_transposed=transposed, backend=backend,
        ).neg_lse  # fmt: skip

    query.requires_grad_(), bank.requires_grad_()
    weight = torch.randn(5)
    eager, compiled = step(query, bank), torch.compile(step, fullgraph=True)(query, bank)
    torch.testing.assert_close(eager, compiled)
    for a, b in zip(
        *(both_gradients(x, query, bank, weight) for x in (eager, compiled)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_autocast_changes_nothing(backend):
    query, bank, s_pos, bias = case(5, 100, 16, torch.float32)
    query.requires_grad_(), bank.requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            lse = bank_pass(
                query, None, bank, 80, s_pos, temperature=0.1, slot_bias=bias, backend=backend
            ).neg_lse
        results.append((lse, *both_gradients(lse, query, bank, torch.ones(5))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_bias": torch.zeros(5)}, "slot_bias: got"),
        ({"slot_bias": 0.5}, "slot_bias: got float"),
        ({"slot_bias": torch.zeros(20, device="meta")}, "slot_bias: got device"),
        ({"slot_bias": torch.zeros(20), "selection": "expected"}, "slot_bias: got a tensor with"),
        ({"slot_bias": torch.zeros(20, requires_grad=True)}, "slot_bias: got one that requires"),
        ({"exclude_transposed": torch.zeros(5, 1)}, "exclude_transposed: got"),
        ({"exclude_transposed": torch.zeros(20, 1)}, "exclude_transposed: got dtype"),
        ({"exclude": torch.zeros(5, 1).long()}, "exclude_transposed: got None with"),
        ({"exclude_transposed": torch.zeros(20, 1).long()}, "exclude_transposed: got lists"),
        ({"selection": "expected"}, "bank: got one that requires a gradient"),
        ({"topk": 1}, "bank: got one that requires a gradient"),
    ],
)
def test_bad_input(change, message):
    query, key, bank, s_pos = problem(5, 20, 8)
    bank.requires_grad_()
    settings = {"query": query, "key": key, "bank": bank, "count": None, "s_pos": s_pos}
    with pytest.raises(ValueError, match=f"^{message}.*wanted"):
        bank_pass(**(settings | {"temperature": 0.2} | change))
