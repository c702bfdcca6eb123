import inspect
import pydoc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import problem

from psm_kernels import InfoNCELoss, MSFLoss, PSMLoss, PSMOutput, functional
from psm_kernels.compat import CrossBatchPSM


def batches(n, batch=6, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, batch, dim, generator=g).unbind() for _ in range(n)]


def test_plain_call_equals_the_functional_twin(backend):
    criterion = PSMLoss(0.2, (50, 8), topk=3, seed=9, backend=backend)
    for step, (query, key) in enumerate(batches(4)):
        bank = criterion.memory_bank.bank.clone()
        count = criterion.memory_bank.count.clone()
        loss = criterion(query, key)
        assert isinstance(loss, torch.Tensor)
        state = torch.tensor([9, step])
        want = functional.psm_loss(
            query, key, bank, count=count, temperature=0.2, topk=3, rng_state=state, backend=backend
        )
        assert torch.equal(loss, want)
        assert criterion.rng_state.tolist() == [9, step + 1]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_length_of_rows_does_not_matter(backend, scale):
    query, key, bank, _ = problem(6, 40, 8)
    settings = {"rng_state": torch.tensor([1, 2]), "backend": backend}
    want = functional.psm_loss(query, key, bank, **settings)
    leaf = (query * scale).requires_grad_()
    got = functional.psm_loss(leaf, key * scale, bank, **settings)
    got.backward()
    torch.testing.assert_close(got, want)
    assert (leaf.grad * scale).abs().sum() > 0.01


def test_read_before_write():
    """A batch is not its own negative: with the keys already in, the first loss would not be 0."""
    query, key = batches(1)[0]
    assert float(PSMLoss(0.2, (50, 8))(query, key)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("training", "grad", "update", "written"),
    [
        (True, True, None, True),
        (False, True, None, False),
        (True, False, None, False),
        (True, True, False, False),
        (False, False, True, True),
    ],
)
def test_when_the_bank_is_updated(training, grad, update, written):
    criterion = PSMLoss(0.2, (50, 8)).train(training)
    with torch.set_grad_enabled(grad):
        criterion(*batches(1)[0], update=update)
    assert int(criterion.memory_bank.count) == (6 if written else 0)


def test_accumulation_equals_the_big_batchs_bank():
    """Micro-batches with update=False, then one enqueue: the bank of one big step."""
    whole, parts = PSMLoss(0.2, (50, 8)), PSMLoss(0.2, (50, 8))
    for query, key in batches(3):
        whole(query, key)
        for q, k in zip(query.chunk(3), key.chunk(3), strict=True):
            parts(q, k, update=False)
        parts.enqueue(key)
    assert torch.equal(whole.memory_bank.bank, parts.memory_bank.bank)
    assert torch.equal(whole.memory_bank.ptr, parts.memory_bank.ptr)


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_load_step_is_the_uninterrupted_run(backend, bank_dtype):
    steps = batches(7, batch=9)
    run = PSMLoss(0.2, (40, 8), bank_dtype=bank_dtype, backend=backend)
    for query, key in steps[:4]:
        run(query, key, labels=torch.arange(9))
    resumed = PSMLoss(0.2, (40, 8), bank_dtype=bank_dtype, seed=77, backend=backend)
    resumed.load_state_dict(run.state_dict())
    for query, key in steps[4:]:
        first, second = query.clone().requires_grad_(), query.clone().requires_grad_()
        a, b = run(first, key), resumed(second, key)
        a.backward()
        b.backward()
        assert torch.equal(a, b)
        assert torch.equal(first.grad, second.grad)
    for name, value in run.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("prefix", ["", "memory_bank."])
def test_loads_a_moco_checkpoint(prefix):
    queue = torch.nn.functional.normalize(torch.randn(8, 20), dim=0)
    criterion = PSMLoss(0.2, (20, 8), seed=4)
    state = {prefix + "queue": queue, prefix + "queue_ptr": torch.tensor([5])}
    if prefix:
        state["rng_state"] = torch.tensor([4, 0])
    criterion.load_state_dict(state)
    assert torch.equal(criterion.memory_bank.bank, queue.T)
    assert criterion.rng_state.tolist() == [4, 0]


def test_another_size_is_refused_whole():
    criterion, other = PSMLoss(0.2, (20, 8)), PSMLoss(0.2, (30, 8), seed=5)
    criterion(*batches(1)[0])
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    with pytest.raises(ValueError, match=r"\(30, 8\).*\(20, 8\)"):
        criterion.load_state_dict(other.state_dict())
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("negatives", ["bank", "neighbors"])
def test_compiles_whole_with_the_enqueue(backend, negatives):
    """No graph break means no host synchronization either; three batches wrap the bank of 20."""
    settings = {"temperature": 0.2, "memory_bank_size": (20, 8), "negatives": negatives}
    eager, module = (PSMLoss(**settings, backend=backend) for _ in range(2))
    compiled = torch.compile(module, fullgraph=True)
    for query, key in batches(4, batch=9):
        a, b = query.clone().requires_grad_(), query.clone().requires_grad_()
        x, y = eager(a, key), compiled(b, key)
        torch.testing.assert_close(x, y)
        x.backward()
        y.backward()
        torch.testing.assert_close(a.grad, b.grad)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(value, module.state_dict()[name])


def test_two_losses_on_one_embedding(backend):
    """The backward of the first must not be broken by the second's enqueue, nor inputs written."""
    query, key = batches(1)[0]
    query.requires_grad_()
    copy = query.detach().clone()
    first, second = (PSMLoss(t, (50, 8), backend=backend) for t in (0.1, 0.5))
    for criterion in (first, second):
        criterion.enqueue(torch.randn(30, 8))
    loss = first(query, key) + second(query, key) + first(query, key)
    loss.backward()
    assert torch.equal(query.detach(), copy)
    assert query.grad.isfinite().all()


def test_autocast_and_half_inputs(backend):
    criterion = PSMLoss(0.2, (50, 8), backend=backend)
    criterion.enqueue(torch.randn(30, 8))
    query, key = (t.bfloat16() for t in batches(1)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(query.requires_grad_(), key)
    loss.backward()
    assert loss.dtype == torch.float32
    assert criterion.memory_bank.bank.dtype == torch.float32
    assert query.grad.dtype == torch.bfloat16


def test_statistics_come_when_asked():
    criterion = PSMLoss(0.2, (50, 8))
    labels, ids = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6)
    for query, key in batches(3):
        out = criterion(query, key, labels=labels, ids=ids, return_stats=True)
    assert isinstance(out, PSMOutput)
    stats = out.stats.as_dict()
    assert stats["bank_fill"] == pytest.approx(12 / 50)
    assert stats["bank_age"] == pytest.approx(2)
    assert 0 <= stats["positive_purity"] <= 1
    assert stats["own_copies"] == 2
    assert not any(value.requires_grad for value in vars(out.stats).values())


def test_memory_is_not_batch_times_bank(backend):
    """With B K floats = 64 MB, the peak of new memory stays far below (Linux's high-water mark)."""
    if backend == "reference":
        pytest.skip("the oracle writes B x K matrices on purpose")
    from torch.profiler import ProfilerActivity, profile

    query, key, bank, _ = problem(256, 65536, 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        functional.psm_loss(query, key, bank, backend=backend)
    largest = max(event.cpu_memory_usage for event in trace.events())
    assert largest < 16 << 20


class Pair(Sequence):
    """Such as omegaconf's ListConfig: a sequence, but neither a tuple nor a list."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return (16, 8)[i]


@pytest.mark.parametrize(
    "size",
    [Pair(), [16, 8], torch.Size([16, 8]), (np.int64(16), np.uint8(8)), np.shape([[0] * 8] * 16)],
)
@pytest.mark.parametrize("kind", [PSMLoss, InfoNCELoss])
def test_any_sequence_of_two_integers_is_a_size(kind, size):
    bank = kind(0.2, size).memory_bank
    assert (bank.size, bank.dim) == (16, 8)
    assert (type(bank.size), type(bank.dim)) == (int, int)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PSMLoss(0.2, 4096), r"memory_bank_size: got 4096.*\(4096, 128\)"),
        (lambda: PSMLoss(0.2, 0), r"memory_bank_size: got 0, .*\(16384, 128\)"),
        (lambda: PSMLoss(0.2, True), r"memory_bank_size: got True, .*\(16384, 128\)"),
        (lambda: PSMLoss(0.2, "88"), r"memory_bank_size: got '88', .*\(16384, 128\)"),
        (
            lambda: PSMLoss(0.2, np.int64(64)),
            r"memory_bank_size: got np.int64\(64\), .*\(64, 128\)",
        ),
        (lambda: PSMLoss(0.2, (8, True)), r"memory_bank_size\[1\]: got True"),
        (lambda: PSMLoss(0.2, (0, 8)), r"memory_bank_size\[0\]: got 0"),
        (lambda: PSMLoss(0.2, (8, 8.0)), r"memory_bank_size\[1\]: got 8.0"),
        (lambda: PSMLoss(0, (8, 8)), "temperature: got 0"),
        (lambda: PSMLoss(float("nan"), (8, 8)), "temperature: got nan"),
        (lambda: PSMLoss(0.2, (8, 8), topk=9), "topk: got 9"),
        (lambda: PSMLoss(0.2, (8, 8), topk=-1), "topk: got -1"),
        (lambda: PSMLoss(0.2, (8, 8), selection="x"), "selection: got 'x'"),
        (lambda: PSMLoss(0.2, (8, 8), reduction="x"), "reduction: got 'x'"),
        (lambda: PSMLoss(0.2, (8, 8), bank_dtype=torch.int8), "dtype: got torch.int8"),
        (lambda: PSMLoss(0.2, (8, 8), seed=0.5), "seed: got 0.5"),
        (lambda: PSMLoss(0.2, (8, 8), backend="x"), "backend: got 'x'"),
        (lambda: PSMLoss(0.2, (8, 8), indexed_bank=1.5), "indexed: got 1.5"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(6, 9)}, "query: got"),
        ({"query": torch.ones(5, 8)}, "key: got"),
        ({"key": torch.ones(8)}, "key: got"),
        ({"projection": torch.ones(6, 9)}, "projection: got"),
        ({"labels": torch.ones(4, dtype=torch.int64)}, "labels: got"),
    ],
)
def test_a_failed_call_changes_nothing(change, message):
    criterion = PSMLoss(0.2, (20, 8), topk=3)
    criterion(*batches(1)[0])
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    query, key = batches(1, seed=1)[0]
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"^{message}"):
        criterion(**({"query": query, "key": key} | change))
    with pytest.raises(ValueError, match=r"^backend: got 'no such'"):
        criterion.backend = "no such"
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_repr_names_the_settings():
    text = repr(PSMLoss(0.2, (20, 8), topk=3))
    assert "temperature=0.2" in text
    assert "topk=3" in text
    assert "size=20, dim=8" in text


@pytest.mark.parametrize("loss", [PSMLoss, MSFLoss, CrossBatchPSM], ids=lambda loss: loss.__name__)
def test_a_signature_names_every_setting(loss):
    """Settings stand once, in the options: `help` has them, with the defaults of the method."""
    takes = inspect.signature(loss).parameters
    assert {"topk", "reduction", "seed", "backend", "shard_bank"} <= set(takes)
    assert takes["topk"].default == loss.Options().topk
    assert not any(p.kind is p.VAR_KEYWORD for p in takes.values())
    assert "topk" in pydoc.render_doc(loss)
    with pytest.raises(TypeError, match="topK"):
        loss(*[8] * (loss is CrossBatchPSM), topK=3)
