"""What a bank says of its rows with a label: without a (B, K) matrix, without its row's copies."""

import pytest
import torch
from conftest import problem

from psm_kernels.bank import BankView


def by_hand(bank, labels_held, ids_held, count, labels, ids):
    """Sum and number of each row in a plain loop."""
    total, number = torch.zeros(len(labels), bank.shape[1], dtype=torch.float64), []
    for i, (label, name) in enumerate(zip(labels.tolist(), ids.tolist(), strict=True)):
        same = [
            j
            for j in range(count)
            if label >= 0 and labels_held[j] == label and (name < 0 or ids_held[j] != name)
        ]
        total[i] = bank[same].double().sum(0)
        number.append(len(same))
    return total, torch.tensor(number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (40, 33), (20000, 19000), (40, 0)])
def test_equal_to_a_loop(size, count, given, dtype):
    """The ids come again in batch and bank; row 2 is the sample of row 0 with another label."""
    _, _, bank, _ = problem(6, size, 16, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    labels_held = torch.randint(-1, 4, (size,), generator=generator)
    ids_held = torch.randint(-1, 5, (size,), generator=generator)
    bank[count:], labels_held[count:] = torch.nan, 1
    labels, ids = torch.tensor([1, 2, -1, 1, 9, 1]), torch.tensor([3, -1, 3, 0, 1, 3])
    view = BankView(bank, count, ids_held if given else None, labels_held)
    exclude = view.own_copies(labels[:, None], ids if given else None)
    total, number = view.label_sums(labels, exclude)
    nobody = torch.full_like(ids, -1)
    want = by_hand(bank, labels_held, ids_held, count, labels, ids if given else nobody)
    torch.testing.assert_close(total, want[0].to(view.sums))
    assert torch.equal(number, want[1])


def test_compiles_whole():
    """No graph break means that nothing waits for the device."""
    _, _, bank, _ = problem(6, 40, 16)
    labels, ids = torch.arange(6) % 3, torch.arange(6)

    def sums(bank, labels):
        view = BankView(bank, 30, torch.arange(40) % 7, torch.arange(40) % 4)
        return view.label_sums(labels, view.own_copies(labels[:, None], ids))

    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(bank, labels), sums(bank, labels), strict=True):
        torch.testing.assert_close(got, want)
