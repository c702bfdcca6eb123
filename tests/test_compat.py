"""A user of lightly, pytorch-metric-learning or MoCo's script changes a line or two; where the
maths is the same, so is the loss. The peers run as released: `pip install psm_kernels[peers]`."""

import copy

import pytest
import torch
from torch import nn

from psm_kernels import InfoNCELoss, PSMLoss
from psm_kernels.compat import CrossBatchPSM, NTXentLoss, from_moco
from psm_kernels.functional import info_nce_loss
from psm_kernels.rows import unit_rows

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


# What lightly asks of its own loss (tests/loss/test_ntx_ent_loss.py), asked of ours.


@pytest.mark.parametrize("gather_distributed", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1, 10])
@pytest.mark.parametrize("dim", [1, 2, 16, 64])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_lightly_algorithm_1_of_simclr(batch, dim, temperature, gather_distributed):
    g = torch.Generator().manual_seed(0)
    out0, out1 = (torch.randn(batch, dim, generator=g) for _ in range(2))
    criterion = NTXentLoss(temperature, gather_distributed=gather_distributed)
    z = unit_rows(torch.cat((out0, out1)).double(), torch.float64)
    e = torch.exp(z @ z.T / temperature)
    other = torch.arange(2 * batch).roll(batch)
    wanted = -(e.gather(1, other[:, None])[:, 0] / (e.sum(1) - e.diagonal())).log().mean()
    for pair in ((out0, out1), (out1, out0)):
        assert float(criterion(*pair)) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("gather_distributed", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1, 7])
@pytest.mark.parametrize("size", [0, 1, 2, 8, 15, 16, 17])
@pytest.mark.parametrize("batch", [1, 2, 8, 16])
def test_lightly_equal_embeddings(batch, size, temperature, gather_distributed):
    """All similarities are 1: the loss counts the negatives."""
    out0, out1 = (torch.rand(batch, 1) * torch.tensor([1.0, 2.0]) for _ in range(2))
    out0.requires_grad_()
    criterion = NTXentLoss(temperature, (size, 2) if size else 0, gather_distributed)
    for _ in range(size // batch + 2):
        loss = float(criterion(out0, out1))
    count = size + 1 if size else 2 * batch - 1
    # Logits of 1 / 0.1 in fp32 are exact to 5e-7, and the random rows are other ones each time.
    assert loss == pytest.approx(float(torch.tensor(count).log()), abs=3e-6)


@pytest.mark.parametrize("dim", [1, 32])
def test_lightly_any_batch_and_both_orders(dim):
    criterion, with_bank = NTXentLoss(), NTXentLoss(memory_bank_size=(64, dim))
    for batch in range(1, 20):
        out0, out1 = torch.randn(2, batch, dim).unbind()
        assert float(criterion(out0, out1)) == pytest.approx(float(criterion(out1, out0)), abs=1e-5)
        assert with_bank(out0, out1).isfinite()


@pytest.mark.parametrize("there", [True, False])
def test_lightly_asks_once_whether_torch_is_distributed(monkeypatch, there):
    asked = []
    monkeypatch.setattr(torch.distributed, "is_available", lambda: asked.append(0) or there)
    if there:
        NTXentLoss(gather_distributed=True)
    else:
        with pytest.raises(ValueError, match=r"^gather_distributed"):
            NTXentLoss(gather_distributed=True)
    assert len(asked) == 1


def test_adapters_take_ids_and_update():
    criterion, plain = NTXentLoss(0.2, (SIZE, DIM)), InfoNCELoss(0.2, (SIZE, DIM))
    ids = torch.arange(BATCH)
    for loss in (criterion, plain):
        loss(*pair(0), ids=ids, update=True)
        loss(*pair(1), update=False)
    assert criterion.memory_bank.ids.tolist() == plain.memory_bank.ids.tolist()
    assert torch.equal(criterion(*pair(1), ids=ids), plain(*pair(1), ids=ids))
    embeddings, labels, mask = concatenated(*pair(0))
    cross = CrossBatchPSM(DIM, SIZE, 0.2, topk=2)
    cross(embeddings, labels, enqueue_mask=mask, ids=ids)
    assert cross.memory_bank.ids[:BATCH].tolist() == ids.tolist()
    cross(embeddings, labels, enqueue_mask=mask, update=False)
    assert int(cross.memory_bank.count) == BATCH


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
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
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


class Model(nn.Module):
    """That script after the change: what its checkpoints have on the model is now in the loss."""

    def __init__(self, loss=InfoNCELoss):
        super().__init__()
        self.encoder = nn.Linear(3, DIM)
        self.criterion = loss(0.2, (SIZE, DIM))


def old_checkpoint(prefix="", **change):
    script = Script()
    script.encoder = nn.Linear(3, DIM)
    state = script.state_dict() | {"queue_ptr": torch.tensor([16])} | change
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("loss", [InfoNCELoss, PSMLoss])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_whole_moco_checkpoint(prefix, loss):
    queue = 3 * torch.randn(DIM, SIZE)  # normalized when it is read
    state, model = old_checkpoint(prefix, queue=queue), Model(loss)
    model.load_state_dict(from_moco(state, model))
    bank = model.criterion.memory_bank
    torch.testing.assert_close(bank.bank, unit_rows(queue.T))
    assert (int(bank.ptr), int(bank.count)) == (16, SIZE)
    assert torch.equal(model.encoder.weight, state[prefix + "encoder.weight"])
    assert state.keys() == old_checkpoint(prefix).keys()  # the caller's dict stays


@pytest.mark.parametrize(
    ("change", "model", "match"),
    [
        ({"queue": torch.randn(2, DIM, SIZE)}, Model(), "^view: got None for a queue"),
        ({"queue": torch.randn(DIM, 5)}, Model(), r"^queue: got shape \(D, K\) = \(16, 5\)"),
        ({"other.queue": torch.ones(1)}, Model(), "^state_dict: got 2 entries named queue"),
        ({}, nn.Linear(2, 2), "^model: got 0 losses"),
    ],
)
def test_a_checkpoint_that_does_not_fit(change, model, match):
    with pytest.raises(ValueError, match=match):
        from_moco(old_checkpoint(**change), model)


def test_one_queue_of_two():
    queues, model = torch.randn(2, DIM, SIZE), Model()
    model.load_state_dict(from_moco(old_checkpoint(queue=queues), model, view=1))
    torch.testing.assert_close(model.criterion.memory_bank.bank, unit_rows(queues[1].T))
    with pytest.raises(ValueError, match="the queues of two views"):
        model.criterion.load_state_dict({"queue": queues})
