"""The methods beside PSM as fp64 formulas, written here a second time in plain loops."""

import math

import pytest
import torch

from psm_kernels import noise

each_form = pytest.mark.parametrize("form", ["bank", "batch"])


def data(batch=6, size=20, dim=8, dtype=torch.float64, seed=0):
    """query (B, D), key (B, D) with gradient, bank (K, D) of unit rows."""
    generator = torch.Generator().manual_seed(seed)
    query, key, bank = (
        torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (batch, batch, size)
    )
    key = query + key  # a positive that resembles its query
    bank = torch.nn.functional.normalize(bank, dim=1)
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_(), bank.to(dtype)


def anchors(query, key, bank, count=None):
    """(anchor, positive, negatives (n, D)) of every row, in plain loops."""
    unit = torch.nn.functional.normalize
    query, key = unit(query, dim=1), unit(key, dim=1)
    if bank is not None:
        return [(q, k, bank[:count]) for q, k in zip(query, key, strict=True)]
    rows, batch = torch.cat((query, key)), len(query)
    result = []
    for i in range(2 * batch):
        others = [j for j in range(2 * batch) if j % batch != i % batch]
        result.append((rows[i], rows[(i + batch) % (2 * batch)], rows[others]))
    return result


def expected_info_nce(query, key, bank, count=None, temperature=0.5):
    losses = []
    for anchor, positive, negatives in anchors(query, key, bank, count):
        pos, neg = ((x @ anchor / temperature).exp() for x in (positive, negatives))
        losses.append(-(pos / (pos + neg.sum())).log())
    return torch.stack(losses).mean()


def expected_hcl(
    query, key, bank, count=None, temperature=0.5, beta=1.0, tau_plus=0.1, detach_weights=False,
    made=None,
):  # fmt: skip
    losses = []
    for row, (anchor, positive, negatives) in enumerate(anchors(query, key, bank, count)):
        if made is not None:
            negatives = torch.cat((negatives, made[row].detach()))
        n = len(negatives)
        pos, x = ((v @ anchor / temperature).exp() for v in (positive, negatives))
        weight = x**beta / (x**beta).mean()
        weight = weight.detach() if detach_weights else weight
        hard = (-tau_plus * n * pos + (weight * x).sum()) / (1 - tau_plus)
        hard = hard.clamp_min(n * math.exp(-1 / temperature))
        losses.append(-(pos / (pos + hard)).log())
    return torch.stack(losses).mean()


def synthetic(query, key, bank, rng_state, num_hard, num_synthetic, mix="pair", count=None):
    """Each anchor's synthetic negatives, from the noise words as the docstring says."""
    state = torch.tensor([rng_state[0], rng_state[1] + (3 << 32)])
    result = []
    for row, (anchor, _, negatives) in enumerate(anchors(query, key, bank, count)):
        order = (negatives @ anchor).argsort(descending=True)[:num_hard]
        words = noise.philox_words(torch.tensor([row]), torch.arange(3 * num_synthetic), state)[0]
        made = []
        for u in range(num_synthetic):
            first, second, alpha = words[3 * u : 3 * u + 3].tolist()
            m1 = negatives[order[first * len(order) // 2**32]]
            m2 = negatives[order[second * len(order) // 2**32]]
            alpha = alpha / 2**32
            mixed = {
                "pair": alpha * m1 + (1 - alpha) * m2,
                "query": alpha * anchor + (1 - alpha) * m1,
                "none": m1,
            }[mix]
            made.append(mixed / mixed.norm())
        result.append(torch.stack(made))
    return result


def scaled(value):
    span = value.max() - value.min()
    return (value - value.min()) / span if span > 1e-12 else torch.ones_like(value)


def expected_unremix(query, key, bank, count=None, temperature=0.5, weights=(1 / 3,) * 3):
    losses = []
    for anchor, positive, negatives in anchors(query, key, bank, count):
        n = len(negatives)
        s_pos, s = positive @ anchor, negatives @ anchor
        with torch.no_grad():
            pi = (torch.cat((s_pos[None], s)) / temperature).softmax(0)
            alignment = torch.zeros_like(pi)
            alignment[pi.argmax()] = 1
            u = (pi - alignment).abs()[1:]
            apart = 1 - negatives @ negatives.T
            r = torch.stack(
                [apart[j][torch.arange(n) != j].sum() / max(n - 1, 1) for j in range(n)]
            )
            w = sum(c * scaled(v) for c, v in zip(weights, (s, u, r), strict=True))
        pos, x = (s_pos / temperature).exp(), (s / temperature).exp()
        losses.append(-(pos / (pos + n * (w * x).sum() / w.sum())).log())
    return torch.stack(losses).mean()


def unit_pairs(query, key):
    unit = torch.nn.functional.normalize
    return list(zip(unit(query, dim=1), unit(key, dim=1), strict=True))


def seen_slots(i, size, count, ids, bank_ids):
    """The slots that row i sees."""
    count = size if count is None else count
    named = ids is not None and ids[i] >= 0
    return [j for j in range(count) if not (named and bank_ids[j] == ids[i])]


def expected_nnclr(query, key, bank, count=None, temperature=0.2, ids=None, bank_ids=None):
    pairs, losses = unit_pairs(query, key), []
    for i, (_, k) in enumerate(pairs):
        slots = seen_slots(i, len(bank), count, ids, bank_ids)
        nearest = max(
            (bank[j] for j in slots), key=lambda m, k=k: m @ k.detach(), default=k
        ).detach()
        others = [
            q for j, (q, _) in enumerate(pairs)
            if j != i and not (ids is not None and ids[j] == ids[i] >= 0)
        ]  # fmt: skip
        logits = torch.stack([nearest @ q / temperature for q in (pairs[i][0], *others)])
        losses.append(-logits.log_softmax(0)[0])
    return torch.stack(losses)


def expected_supcon(
    query, key, bank, labels, bank_labels, count=None, temperature=0.1, ids=None, bank_ids=None
):
    losses = []
    for i, (q, k) in enumerate(unit_pairs(query, key)):
        slots = seen_slots(i, len(bank), count, ids, bank_ids)
        rows = torch.stack([k, *(bank[j] for j in slots)])
        log_p = (rows @ q / temperature).log_softmax(0)
        alike = [1 + n for n, j in enumerate(slots) if bank_labels[j] == labels[i] >= 0]
        losses.append(-log_p[[0, *alike]].mean())
    return torch.stack(losses)


def expected_ressl(
    query, key, bank, count=None, temperature=0.1, teacher_temperature=0.04, ids=None, bank_ids=None
):
    losses = []
    for i, (q, k) in enumerate(unit_pairs(query, key)):
        rows = bank[seen_slots(i, len(bank), count, ids, bank_ids)]
        target = (rows @ k.detach() / teacher_temperature).softmax(0)
        losses.append(-(target * (rows @ q / temperature).log_softmax(0)).sum())
    return torch.stack(losses)


def expected_msf(query, key, bank, count=None, topk=5, ids=None, bank_ids=None):
    losses = []
    for i, (q, k) in enumerate(unit_pairs(query, key)):
        k = k.detach()
        rows = [bank[j] for j in seen_slots(i, len(bank), count, ids, bank_ids)]
        rows = sorted(rows, key=lambda m, k=k: m @ k, reverse=True)[: topk - 1]
        losses.append(torch.stack([(q - m).square().sum() for m in (k, *rows)]).mean())
    return torch.stack(losses)


def assert_same(got, wanted, *inputs, rtol=1e-9):
    """Values and gradients agree."""
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol)
    for a, b in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
