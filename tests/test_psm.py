import math

import pytest
import torch
from conftest import problem

from psm_kernels import noise, rank_gradient_stats
from psm_kernels.functional import psm_loss


def golden_loss(golden, dtype, **change):
    p = golden.p
    query = golden.query.clone().to(dtype).requires_grad_()
    settings = {
        "count": golden.count,
        "temperature": p["tau"],
        "topk": p["k"],
        "a": p["a"],
        "b": p["b"],
        "selection": p["selection"],
        "soft_weights": p["weights"],
        "weight_temperature": p["weight_temperature"],
        "hard_weight": p["lam"],
        "rng_state": golden.rng_state,
        "row_offset": p["row_offset"],
        "reduction": "none",
        **change,
    }
    return query, psm_loss(query, golden.key.to(dtype), golden.bank.to(dtype), **settings)


def test_golden_float64(golden):
    query, loss = golden_loss(golden, torch.float64)
    torch.testing.assert_close(loss.detach(), golden.loss, atol=1e-10, rtol=1e-10)
    loss.mean().backward()
    torch.testing.assert_close(query.grad, golden.grad_query, atol=1e-6, rtol=1e-6)


def test_golden_float32(golden, backend):
    query, loss = golden_loss(golden, torch.float32, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), golden.loss, atol=1e-5, rtol=1e-5)
    loss.mean().backward()
    torch.testing.assert_close(query.grad.double(), golden.grad_query, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("soft_weights", ["attention", "uniform", "binary"])
@pytest.mark.parametrize("selection", ["bernoulli", "all"])
@pytest.mark.parametrize("negatives", ["bank", "neighbors"])
def test_gradcheck(soft_weights, selection, negatives):
    query, key, bank, _ = (t.double() for t in problem(3, 30, 6))
    projection = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    query, key = (3 * query).requires_grad_(), (2 * key).requires_grad_()

    def loss(q, k, z):
        return psm_loss(
            q,
            k,
            bank,
            count=25,
            temperature=0.3,
            topk=3,
            selection=selection,
            soft_weights=soft_weights,
            negatives=negatives,
            projection=z,
            rng_state=torch.tensor([1, 2]),
            reduction="none",
        )

    assert torch.autograd.gradcheck(loss, (query, key, projection), fast_mode=True)


def naive_neighbors(query, key, bank, tau, k, a, b, lam, rng_state, row_offset):
    """negatives="neighbors" with loops, from the released code's description."""
    q, z = (torch.nn.functional.normalize(t) for t in (query, key))
    batch = len(q)
    near = (z @ bank.T).topk(k).indices
    blocks = [torch.cat((z[i : i + 1], bank[near[i]])) for i in range(batch)]
    views = torch.cat((q, z))

    def keeps(s, s_pos, row, column, tag):
        state = torch.tensor([rng_state[0], rng_state[1] + (tag << 32)])
        word = noise.philox_words(torch.tensor([row]), torch.tensor([column]), state)
        return int(word) < int(min(math.exp(-a * (s - s_pos - b) ** 2), 0.999) * 2**32)

    losses = []
    for i in range(batch):
        s_pos = float(q[i] @ z[i])
        terms = [math.exp(float(q[i] @ m) / tau) for m in blocks[i]]
        total = sum(terms)
        for j in range(batch):
            for c, m in enumerate(blocks[j]):
                s = float(q[i] @ m)
                if j != i and keeps(s, s_pos, row_offset + i, j * (1 + k) + c, 1):
                    total += math.exp(s / tau)
        w = torch.softmax(q[i] @ blocks[i][1:].T, 0)
        loss = math.log(total / terms[0])
        loss += sum(float(w[c]) * math.log(total / terms[1 + c]) for c in range(k))
        for r in (i, batch + i):
            pos = (r + batch) % (2 * batch)
            s_pos = float(views[r] @ views[pos])
            total = math.exp(s_pos / tau)
            for j in range(2 * batch):
                s = float(views[r] @ views[j])
                if j not in (r, pos) and keeps(s, s_pos, 2 * row_offset + r, j, 2):
                    total += math.exp(s / tau)
            loss += lam / 2 * math.log(total / math.exp(s_pos / tau))
        losses.append(loss)
    return torch.tensor(losses)


def test_neighbors_equals_loops():
    query, key, bank, _ = (t.double() for t in problem(4, 30, 6))
    got = psm_loss(
        query,
        key,
        bank,
        temperature=0.4,
        topk=3,
        a=3.0,
        b=-0.1,
        hard_weight=0.7,
        negatives="neighbors",
        rng_state=torch.tensor([3, 9]),
        row_offset=2,
        reduction="none",
    )
    want = naive_neighbors(query, key, bank, 0.4, 3, 3.0, -0.1, 0.7, (3, 9), 2)
    torch.testing.assert_close(got, want.double(), atol=1e-6, rtol=1e-6)


def info_nce(query, key, bank, tau):
    q, k = torch.nn.functional.normalize(query), torch.nn.functional.normalize(key)
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ bank.T), 1) / tau
    return torch.nn.functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def test_without_mining_it_is_info_nce(backend):
    query, key, bank, _ = problem(6, 300, 16)
    loss = psm_loss(
        query, key, bank, temperature=0.1, topk=0, selection="all", hard_weight=0.0, backend=backend
    )
    torch.testing.assert_close(loss, info_nce(query, key, bank, 0.1))


def test_infinite_density_leaves_no_negatives(backend):
    query, key, bank, _ = problem(6, 300, 16)
    loss = psm_loss(query, key, bank, topk=0, a=1e30, reduction="none", backend=backend)
    torch.testing.assert_close(loss, torch.zeros(6))


def test_zero_density_keeps_999_of_1000(backend):
    query, key, bank, _ = problem(8, 5000, 16)
    out = psm_loss(query, key, bank, a=0.0, return_stats=True, backend=backend)
    assert float(out.stats.kept) == pytest.approx(0.999, abs=0.001)


def test_empty_bank_gives_zero(backend):
    query, key, bank, _ = problem(4, 20, 16)
    query.requires_grad_()
    bank[:] = torch.nan
    out = psm_loss(query, key, bank, count=0, return_stats=True, backend=backend)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0, abs=1e-6)
    assert query.grad.abs().max() < 1e-6
    assert all(math.isfinite(v) for v in out.stats.as_dict().values())


@pytest.mark.parametrize("soft_weights", ["attention", "uniform", "binary"])
def test_fewer_rows_than_topk(backend, soft_weights):
    """count = 2 < topk = 5: a bank of just those two rows with topk = 2 must give the same."""
    query, key, bank, _ = problem(4, 20, 16)
    settings = {"soft_weights": soft_weights, "rng_state": torch.tensor([1, 2]), "backend": backend}
    few = psm_loss(query, key, bank, count=2, topk=5, **settings)
    same = psm_loss(query, key, bank[:2].contiguous(), topk=2, **settings)
    torch.testing.assert_close(few, same)


@pytest.mark.parametrize("negatives", ["bank", "neighbors"])
def test_zero_vectors_are_finite(backend, negatives):
    query, key, bank, _ = problem(4, 20, 16)
    query[1], key[2] = 0, 0
    query.requires_grad_()
    loss = psm_loss(query, key, bank, temperature=0.02, negatives=negatives, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_spoils_itself_alone(backend, where, bad):
    query, key, bank, _ = problem(5, 60, 16)
    settings = {"reduction": "none", "rng_state": torch.tensor([1, 2]), "backend": backend}
    want = psm_loss(query, key, bank, **settings)
    (query if where == "query" else key)[3, 1] = bad
    got = psm_loss(query, key, bank, **settings)
    assert got[3].isnan()
    others = torch.tensor([0, 1, 2, 4])
    assert torch.equal(got[others], want[others])


def test_cold_and_confident(backend):
    """tau = 0.02, the mined row is all that is kept and far above the key: the hard term is 0."""
    query = torch.zeros(1, 4)
    query[0, 0] = 1
    key = torch.zeros(1, 4)
    key[0, 1] = 1  # s+ = 0
    bank = torch.tensor([[0.8, 0.6, 0, 0], [-1.0, 0, 0, 0]])
    loss = psm_loss(
        query,
        key,
        bank,
        temperature=0.02,
        topk=1,
        a=0.001,  # keeps slot 0 with this seed; slot 1 adds exp(-50 - 50)
        soft_weights="binary",
        rng_state=torch.tensor([0, 0]),
        backend=backend,
    )
    soft = 40.0 + 0.0  # log Z = 40: the key pays 40, the mined row 0
    assert float(loss) == pytest.approx(soft, rel=1e-5)


def test_reductions_and_dtype(backend):
    query, key, bank, _ = problem(5, 60, 16)
    settings = {"rng_state": torch.tensor([1, 2]), "backend": backend}
    rows = psm_loss(query, key, bank, reduction="none", **settings)
    assert rows.shape == (5,)
    torch.testing.assert_close(psm_loss(query, key, bank, reduction="sum", **settings), rows.sum())
    torch.testing.assert_close(psm_loss(query, key, bank, **settings), rows.mean())
    half = psm_loss(query.half(), key.half(), bank, **settings)
    assert half.dtype == torch.float32


def test_autocast_changes_nothing(backend):
    query, key, bank, _ = problem(5, 60, 16)
    settings = {"rng_state": torch.tensor([1, 2]), "backend": backend}
    want = psm_loss(query, key, bank, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = psm_loss(query, key, bank, **settings)
    assert torch.equal(got, want)


def test_low_precision_gradient_is_not_rounded_to_the_bank(backend):
    """A bf16 bank, confident rows: the fp32 gradient is right to the rounding of the inputs."""
    query, key, bank, _ = problem(6, 200, 32, dtype=torch.bfloat16)
    key = query + 0.05 * key
    grads = []
    for b, name in ((bank, backend), (bank.double(), "reference")):
        q = query.clone().requires_grad_()
        psm_loss(
            q, key, b, temperature=0.1, selection="all", topk=3, rng_state=None, backend=name
        ).backward()
        grads.append(q.grad)
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert error < 0.01


def test_default_noise_comes_from_torchs_generator():
    query, key, bank, _ = problem(5, 60, 16)
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append([psm_loss(query, key, bank), psm_loss(query, key, bank)])
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])
    assert losses[0][0] != losses[0][1]


def dense_stats(query, key, bank, count, tau, k, lam, labels, bank_labels, rng_state, a):
    """Statistics of selection="bernoulli", soft_weights="binary" from B x K matrices."""
    sim = query @ bank[:count].T
    s_pos = (query * key).sum(1, keepdim=True)
    near = (key @ bank[:count].T).topk(k).indices
    words = noise.philox_block(0, len(query), count, 0, rng_state)
    keep = noise.keep_weight(sim, s_pos, words, "bernoulli", a, 0.0).bool()
    keep.scatter_(1, near, False)
    e = torch.exp(sim / tau)
    n = (e * keep).sum(1)
    z = torch.exp(s_pos[:, 0] / tau) + e.gather(1, near).sum(1) + n
    h = torch.exp(s_pos[:, 0] / tau) + n
    g = e / tau * ((1 + k) / z + lam / h)[:, None]
    candidates = torch.ones_like(keep).scatter_(1, near, False)
    best = sim.masked_fill(~candidates, -2).amax(1)
    same = labels[:, None] == bank_labels[:count]
    return {
        "kept_count": keep.sum(1).float(),
        "kept": keep.sum() / candidates.sum(),
        "grad_mean": torch.stack([g[i][keep[i]].mean() for i in range(len(g))]),
        "grad_var": torch.stack([g[i][keep[i]].var(unbiased=False) for i in range(len(g))]),
        "positive_similarity": s_pos[:, 0],
        "contrast_acc": (s_pos[:, 0] > best).float().mean(),
        "positive_purity": same.gather(1, near).float().mean(),
        "false_negative_rate": (same & keep).sum() / keep.sum(),
        "bank_fill": torch.tensor(count / len(bank)),
    }


def test_statistics(backend):
    query, key, bank, _ = problem(6, 200, 16)
    labels, bank_labels = torch.arange(6) % 3, torch.arange(200) % 3
    bank_labels[::7] = -1
    rng_state = torch.tensor([5, 1])
    stats = psm_loss(
        query,
        key,
        bank,
        count=150,
        topk=4,
        a=6.0,
        soft_weights="binary",
        hard_weight=0.6,
        rng_state=rng_state,
        labels=labels,
        bank_labels=bank_labels,
        return_stats=True,
        backend=backend,
    ).stats
    want = dense_stats(query, key, bank, 150, 0.5, 4, 0.6, labels, bank_labels, rng_state, 6.0)
    for name, value in want.items():
        torch.testing.assert_close(getattr(stats, name), value, atol=1e-5, rtol=1e-4)
    assert set(stats.as_dict("x/")) == {"x/" + name for name in want}


def test_stats_write_to_a_summary_writer():
    query, key, bank, _ = problem(3, 20, 8)
    written = []
    stats = psm_loss(query, key, bank, return_stats=True).stats
    stats.write(type("W", (), {"add_scalar": lambda self, *a: written.append(a)})(), 7)
    assert ("psm/kept", pytest.approx(float(stats.kept)), 7) in written


def test_gradient_statistics_match_autograd():
    """grad_mean is dloss/ds: perturb one kept negative's similarity and look."""
    query, key, bank, _ = (t.double() for t in problem(1, 12, 16))
    settings = {"topk": 2, "selection": "all", "hard_weight": 0.5, "soft_weights": "binary"}
    out = psm_loss(query, key, bank, return_stats=True, **settings)
    total = 0.0
    mined = (key @ bank.T).topk(2).indices[0].tolist()
    for j in set(range(12)) - set(mined):
        step = torch.zeros_like(bank)
        step[j] = 1e-6 * query[0]
        up, down = (psm_loss(query, key, bank + s * step, **settings) for s in (1, -1))
        total += float(up - down) / 2e-6
    assert float(out.stats.grad_mean[0]) == pytest.approx(total / 10, rel=1e-5)


def test_rank_gradient_stats(backend):
    query, key, bank, s_pos = problem(6, 120, 16)
    got = rank_gradient_stats(query, key, bank, 30, count=100, temperature=0.2, backend=backend)
    sim = query @ bank[:100].T
    z = torch.exp(s_pos / 0.2) + torch.exp(sim / 0.2).sum(1)
    g = torch.exp(sim.sort(1, descending=True).values[:, :30] / 0.2) / z[:, None] / 0.2
    torch.testing.assert_close(got.mean, g.mean(0))
    torch.testing.assert_close(got.var, g.var(0, unbiased=False), atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(got.positive_rank, 1 + (sim > s_pos[:, None]).sum(1).float().mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(8)}, "query: got shape"),
        ({"query": torch.ones(5, 9)}, "query: got shape"),
        ({"key": torch.ones(4, 8)}, "key: got shape"),
        ({"key": torch.ones(5, 8, device="meta")}, "key: got device"),
        ({"bank": torch.ones(8)}, "bank: got shape"),
        ({"count": -1}, "count: got -1"),
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": "0.1"}, "temperature: got '0.1'"),
        ({"topk": 21}, "topk: got 21"),
        ({"a": float("nan")}, "a: got nan"),
        ({"selection": "none"}, "selection: got 'none'"),
        ({"soft_weights": "soft"}, "soft_weights: got 'soft'"),
        ({"weight_temperature": 0}, "weight_temperature: got 0"),
        ({"hard_weight": -1}, "hard_weight: got -1"),
        ({"negatives": "batch"}, "negatives: got 'batch'"),
        ({"projection": torch.ones(5, 7)}, "projection: got shape"),
        ({"reduction": "avg"}, "reduction: got 'avg'"),
        ({"labels": torch.ones(5)}, "labels: got dtype"),
        ({"bank_labels": torch.ones(5, dtype=torch.int64)}, "bank_labels: got"),
        ({"rng_state": torch.zeros(3, dtype=torch.int64)}, "rng_state: got"),
        ({"backend": "gpu"}, "backend: got 'gpu'"),
    ],
)
def test_bad_input_leaves_the_generator_alone(change, message):
    query, key, bank, _ = problem(5, 20, 8)
    before = torch.get_rng_state()
    arguments = {"query": query, "key": key, "bank": bank} | change
    with pytest.raises(ValueError, match=f"^{message}.*wanted"):
        psm_loss(**arguments)
    assert torch.equal(torch.get_rng_state(), before)
