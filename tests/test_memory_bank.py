import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psm_kernels import MemoryBank, PSMLoss
from psm_kernels.backends import registry
from psm_kernels.rows import unit_rows


@given(size=st.integers(1, 12), batches=st.lists(st.integers(1, 30), max_size=8))
@settings(deadline=None, max_examples=60)
def test_ring_holds_the_last_rows(size, batches):
    """Against a Python list, for any B and K, B > K included."""
    bank = MemoryBank(size, 2)
    slots, n = [None] * size, 0
    for batch in batches:
        angles = torch.arange(n, n + batch) * 0.1
        bank.enqueue(torch.stack((angles.cos(), angles.sin()), 1), torch.arange(n, n + batch))
        for i in range(batch):
            slots[(n + i) % size] = n + i
        n += batch
    assert int(bank.ptr) == n % size
    assert int(bank.count) == min(n, size)
    for slot, i in enumerate(slots):
        assert int(bank.labels[slot]) == (-1 if i is None else i)
        if i is not None:
            angle = torch.tensor(i * 0.1)
            wanted = torch.stack((angle.cos(), angle.sin()))
            torch.testing.assert_close(bank.bank[slot], wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_normalized_in_fp32_and_keep_the_banks_dtype(dtype):
    bank = MemoryBank(8, 16, dtype=dtype)
    keys = torch.randn(4, 16) * 1e-4  # squares underflow in fp16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bank.enqueue(keys.to(dtype))
    assert bank.bank.dtype == dtype
    torch.testing.assert_close(bank.bank[:4], unit_rows(keys.to(dtype)).to(dtype))


def test_a_row_that_is_not_finite_is_stored_as_zeros():
    bank = MemoryBank(4, 3)
    bank.enqueue(torch.tensor([[1.0, 0, 0], [float("nan"), 1, 1], [float("inf"), 1, 1], [0, 0, 0]]))
    assert bank.bank.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_unit_rows_of_zero_and_tiny_rows_have_finite_gradients():
    x = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [3.0, 4.0]], requires_grad=True)
    y = unit_rows(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert y[2].tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e30, 1e37])
def test_rows_of_any_length_become_unit_rows(scale):
    rows = torch.tensor([[3.0, 4.0, 0.0], [0.0, -1.0, 0.0]])
    x = (rows * scale).requires_grad_()
    unit = unit_rows(x)
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8, 0.0], [0.0, -1.0, 0.0]]))
    unit[:, 0].sum().backward()
    torch.testing.assert_close(x.grad[0] * scale, torch.tensor([0.128, -0.096, 0.0]))
    bank = MemoryBank(2, 3)
    bank.enqueue(x)
    torch.testing.assert_close(bank.bank, unit.detach())


def test_resumes_bit_for_bit():
    torch.manual_seed(0)
    first, second = MemoryBank(10, 4), MemoryBank(10, 4)
    for _ in range(3):
        first.enqueue(torch.randn(4, 4), torch.arange(4))
    second.load_state_dict(first.state_dict())
    keys = torch.randn(7, 4)
    first.enqueue(keys)
    second.enqueue(keys)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_loads_moco_queue():
    queue = torch.nn.functional.normalize(torch.randn(4, 10), dim=0)  # (D, K)
    bank = MemoryBank(10, 4)
    bank.load_state_dict({"queue": queue, "queue_ptr": torch.tensor([6])})
    assert torch.equal(bank.bank, queue.T)
    assert (int(bank.ptr), int(bank.count)) == (6, 10)
    assert (bank.labels == -1).all()


@pytest.mark.parametrize(
    ("state", "sizes"),
    [
        ({"queue": torch.zeros(4, 11), "queue_ptr": torch.zeros(1)}, ["(4, 11)", "(4, 10)"]),
        (MemoryBank(11, 4).state_dict(), ["(11, 4)", "(10, 4)"]),
    ],
)
def test_refuses_another_size_and_stays_as_it_was(state, sizes):
    bank = MemoryBank(10, 4)
    bank.enqueue(torch.ones(3, 4))
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    with pytest.raises(ValueError, match="K") as error:
        bank.load_state_dict(state)
    assert all(size in str(error.value) for size in sizes)
    for name, value in bank.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_reset_empties():
    bank = MemoryBank(5, 2)
    bank.enqueue(torch.ones(3, 2), torch.ones(3, dtype=torch.int64))
    bank.reset()
    assert all(
        torch.equal(v, MemoryBank(5, 2).state_dict()[n]) for n, v in bank.state_dict().items()
    )


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda b: MemoryBank(0, 3), "size"),
        (lambda b: MemoryBank(3, True), "dim"),
        (lambda b: MemoryBank(3, 3, dtype=torch.int8), "dtype"),
        (lambda b: b.enqueue(torch.ones(3)), "key"),
        (lambda b: b.enqueue(torch.ones(3, 5)), "key"),
        (lambda b: b.enqueue(torch.ones(3, 4, dtype=torch.int64)), "key"),
        (lambda b: b.enqueue([[1.0] * 4]), "key"),
        (lambda b: b.enqueue(torch.ones(3, 4, device="meta")), "key"),
        (lambda b: b.enqueue(torch.ones(3, 4), torch.ones(2, dtype=torch.int64)), "labels"),
        (lambda b: b.enqueue(torch.ones(3, 4), torch.ones(3)), "labels"),
    ],
)
def test_bad_input(make, name):
    bank = MemoryBank(6, 4)
    with pytest.raises(ValueError, match=rf"^{name}: got .*wanted"):
        make(bank)
    assert int(bank.count) == 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
def test_refuses_what_a_backend_cannot_see_through():
    bank, keys = MemoryBank(6, 4), torch.ones(3, 4)

    def call(x):
        bank.enqueue(x)
        return x.sum()

    for run in (
        lambda: torch.jit.trace(call, (keys,), check_trace=False),
        lambda: torch.func.grad(call)(keys),
        lambda: torch.func.vmap(call)(keys[None]),
    ):
        with pytest.raises(RuntimeError, match=r"^torch\.(jit\.trace|func): got"):
            run()
    assert int(bank.count) == 0


def test_a_backend_with_its_own_enqueue_writes(monkeypatch):
    """As `cuda` does; the loss hands over its backend's name."""
    calls = []
    reference = registry.TABLE["reference"]
    monkeypatch.setattr(reference, "enqueue", lambda *args: calls.append(args) or True)
    criterion = PSMLoss(0.5, (8, 4), topk=1, backend="reference")
    keys, labels, bank = torch.randn(3, 4), torch.arange(3), criterion.memory_bank
    ids = torch.tensor([5, -7, 6])
    criterion.enqueue(keys, labels, ids=ids)
    criterion(torch.randn(3, 4, requires_grad=True), keys, labels=labels, ids=ids)
    assert len(calls) == 2
    own = (bank.bank, bank.labels, bank.ids, bank.ptr, bank.count)
    for call, rng_state in zip(calls, (None, criterion.rng_state), strict=True):
        for got, wanted in zip(call, (keys, labels, ids), strict=False):
            assert torch.equal(got, wanted)
        for got, wanted in zip(call[3:], (*own, rng_state), strict=True):
            assert got is wanted
    assert not bank.bank.any()  # nobody else wrote
