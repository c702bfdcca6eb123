"""A user of lightly, pytorch-metric-learning or MoCo's script changes a line or two; where the
maths is the same, so is the loss. The peers run as released: `pip install psm_kernels[peers]`."""

import copy

import pytest
import torch
from torch import nn

from psm_kernels import InfoNCELoss, PSMLoss
from psm_kernels.compat import CrossBatchPSM, NTXentLoss
from psm_kernels.functional import info_nce_loss
from psm_kernels.memory_bank import unit_rows

BATCH, SIZE, DIM = 8, 24, 16


def pair(seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, DIM, generator=generator)
    return query.requires_grad_(), query.detach() + torch.randn(BATCH, DIM, generator=generator)


def assert_same(got, wanted, *inputs):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- lightly -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_lightly_user_with_a_bank(temperature):
    lightly = pytest.importorskip("lightly.loss")
    theirs = lightly.NTXentLoss(temperature, memory_bank_size=(SIZE, DIM))
    ours = NTXentLoss(temperature, memory_bank_size=(SIZE, DIM))
    ours.enqueue(theirs.memory_bank.bank)  # their random first rows
    for step in range(5):  # 24 slots, 8 a step: wraps around
        out0, out1 = pair(step)
        assert_same(ours(out0, out1), theirs(out0, out1), out0)
    torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)
    out0 = out0.detach()
    torch.testing.assert_close(ours(out0, out1), theirs(out0, out1))  # neither enqueues
    torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)


def test_lightly_user_within_the_batch():
    lightly = pytest.importorskip("lightly.loss")
    out0, out1 = pair(0)
    out1.requires_grad_()
    assert_same(NTXentLoss()(out0, out1), lightly.NTXentLoss()(out0, out1), out0, out1)


def test_lightly_defaults():
    criterion = NTXentLoss()
    assert (criterion.temperature, criterion.memory_bank) == (0.5, None)
    criterion = NTXentLoss(0.2, (SIZE, DIM))
    criterion(*pair(0))
    criterion.eval()  # lightly looks at the input, not at the mode
    criterion(*pair(1))
    assert criterion.memory_bank.count == 2 * BATCH


# --- pytorch-metric-learning ---------------------------------------------------------------------


def concatenated(query, key):
    """embeddings, labels and mask as in PML's MoCo example."""
    labels = torch.arange(BATCH)
    mask = torch.zeros(2 * BATCH, dtype=torch.bool)
    mask[BATCH:] = True
    return torch.cat((query, key)), torch.cat((labels, labels)), mask


def test_metric_learning_user_keeps_the_call():
    """PML's CrossBatchMemory and ours side by side in one loop; the bank holds the same rows."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.CrossBatchMemory(losses.NTXentLoss(), embedding_size=DIM, memory_size=SIZE)
    ours = CrossBatchPSM(embedding_size=DIM, memory_size=SIZE, topk=2)
    for step in range(5):
        query, key = pair(step)
        embeddings, labels, mask = concatenated(query, unit_rows(key))
        labels = labels + step * BATCH
        for loss_fn in (theirs, ours):
            loss = loss_fn(embeddings, labels, enqueue_mask=mask)
            loss.backward()
            assert loss.isfinite()
    torch.testing.assert_close(ours.memory_bank.bank, theirs.embedding_memory)
    assert torch.equal(ours.memory_bank.labels, theirs.label_memory)
    ours.reset_queue()
    assert ours.memory_bank.count == 0


def test_cross_batch_psm_is_psm_loss():
    first, second = CrossBatchPSM(DIM, SIZE, 0.2, topk=2), PSMLoss(0.2, (SIZE, DIM), topk=2)
    for step in range(4):
        query, key = pair(step)
        embeddings, labels, mask = concatenated(query, key)
        order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(step))
        order = torch.stack((order, order + BATCH), 1).flatten()  # keys between the queries
        got = first(embeddings[order], labels[order], enqueue_mask=mask[order])
        rows = order[::2]
        wanted = second(query[rows], key[rows], labels=labels[rows])
        assert_same(got, wanted, query)
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b)


def test_metric_learning_loss_is_ours_within_the_batch():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    query, key = pair(0)
    key.requires_grad_()
    embeddings, labels, _ = concatenated(query, key)
    assert_same(
        InfoNCELoss(0.07, 0)(query, key), losses.NTXentLoss()(embeddings, labels), query, key
    )


def test_metric_learning_loss_is_ours_against_a_bank():
    """PML's loss with explicit pairs: the own key is the positive, the rows of the bank negatives.
    Its CrossBatchMemory also takes the batch's other keys as negatives."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    query, key = pair(0)
    bank = unit_rows(torch.randn(SIZE, DIM, generator=torch.Generator().manual_seed(9)))
    rows = torch.arange(BATCH)
    anchors, negatives = torch.meshgrid(rows, BATCH + torch.arange(SIZE), indexing="ij")
    theirs = losses.NTXentLoss(temperature=0.2)(
        query,
        ref_emb=torch.cat((key, bank)),
        indices_tuple=(rows, rows, anchors.flatten(), negatives.flatten()),
    )
    assert_same(info_nce_loss(query, key, bank, temperature=0.2), theirs, query)


def test_cross_batch_memory_is_ours_for_one_row():
    """With one query a batch there are no other keys, and the two memories mean the same."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.CrossBatchMemory(losses.NTXentLoss(0.2), embedding_size=DIM, memory_size=SIZE)
    ours = InfoNCELoss(0.2, (SIZE, DIM))
    first = concatenated(*pair(0))
    theirs(first[0], first[1], enqueue_mask=first[2])
    ours.enqueue(first[0][BATCH:])
    query, key = pair(1)
    for i in range(BATCH):
        rows = torch.cat((query[i : i + 1], key[i : i + 1]))
        label = torch.tensor([BATCH + i] * 2)
        wanted = theirs(rows, label, enqueue_mask=torch.tensor([False, True]))
        assert_same(ours(query[i : i + 1], key[i : i + 1]), wanted, query)
        assert theirs.queue_idx == ours.memory_bank.ptr == BATCH + i + 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"indices_tuple": (0, 1, 2)}, "indices_tuple: got tuple, wanted None"),
        ({"enqueue_mask": None}, "enqueue_mask: got None"),
        ({"enqueue_mask": torch.ones(2 * BATCH)}, "enqueue_mask: got dtype torch.float32"),
        ({"enqueue_mask": torch.arange(2 * BATCH) > BATCH}, "enqueue_mask: got 7 keys for 9"),
        ({"labels": torch.arange(2 * BATCH)}, "labels: got others"),
        ({"labels": torch.arange(BATCH)}, "labels: got"),
        ({"embeddings": torch.randn(2 * BATCH, 3)}, "embeddings: got shape"),
    ],
)
def test_cross_batch_psm_refuses(change, match):
    loss_fn = CrossBatchPSM(DIM, SIZE, topk=2)
    embeddings, labels, mask = concatenated(*pair(0))
    arguments = {"embeddings": embeddings, "labels": labels, "enqueue_mask": mask, **change}
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.raises(ValueError, match=match):
        loss_fn(**arguments)
    assert all(torch.equal(v, before[name]) for name, v in loss_fn.state_dict().items())


# --- MoCo ----------------------------------------------------------------------------------------


class Script(nn.Module):
    """The tail of a MoCo script: normalized q and k come in, logits and labels go out."""

    def __init__(self):
        super().__init__()
        queue = torch.randn(DIM, SIZE, generator=torch.Generator().manual_seed(5))
        self.register_buffer("queue", nn.functional.normalize(queue, dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, q, k, temperature):
        positive = torch.einsum("nc,nc->n", q, k)[:, None]
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat((positive, negative), 1) / temperature
        start = int(self.queue_ptr)
        self.queue[:, start : start + len(k)] = k.T
        self.queue_ptr[0] = (start + len(k)) % SIZE
        return logits, torch.zeros(len(logits), dtype=torch.long)


def test_moco_script_in_one_line():
    script, cross_entropy = Script(), nn.CrossEntropyLoss()
    criterion = InfoNCELoss(0.2, (SIZE, DIM))
    criterion.load_state_dict(copy.deepcopy(script.state_dict()))  # the run goes on where it was
    for step in range(5):
        query, key = pair(step)
        logits, target = script(unit_rows(query), unit_rows(key), 0.2)
        assert_same(criterion(query, key), cross_entropy(logits, target), query)
    torch.testing.assert_close(criterion.memory_bank.bank, script.queue.T)
