"""What a loss asks a bank: `scan`, `topk`, `rows`, wherever the rows lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from psm_kernels import checks, ops
from psm_kernels.backends.base import EMPTY, NOTHING, BankPass, Exclude
from psm_kernels.options import PassOptions, PSMOptions
from psm_kernels.rows import wide

if TYPE_CHECKING:
    from psm_kernels.weighted import RowRanges, WeightedPass

_SLAB = 1 << 13  # rows


class BankView:
    """A bank at the time of one call: its valid rows in this process, and what they are.

    Args:
        bank: (K, D) unit rows, contiguous.
        count: slots [0, count) hold something: 0-d int64 tensor on the device, int, None for K.
        ids, labels: (K,) int64 or None; in ids -1 is unknown, -2 an empty slot.
        backend: "auto" or a name of `python -m psm_kernels`.
    """

    def __init__(
        self,
        bank: Tensor,
        count: Tensor | int | None = None,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        backend: str = "auto",
    ):
        self.bank, self.ids, self.labels, self.backend = bank, ids, labels, backend
        self.count = checks.as_count(count, bank)

    def __len__(self) -> int:
        return self.bank.shape[0]

    @property
    def dim(self) -> int:
        return self.bank.shape[1]

    @property
    def device(self) -> torch.device:
        return self.bank.device

    @property
    def sums(self) -> torch.dtype:
        """Of all that is summed over the bank: fp32, fp64 for an fp64 bank."""
        return wide(self.bank)

    def check(self) -> None:
        """Raise the ValueError that a pass would raise for this bank, before any work."""
        checks.check_bank(self.bank)
        for name, value in (("bank_ids", self.ids), ("bank_labels", self.labels)):
            if value is not None:
                checks.check_vector(name, value, len(self), torch.int64)
                checks.check_device(name, value, self.device)
        ops.check_backend(self.backend, self.bank)

    def own_copies(self, query: Tensor, ids: Tensor | None) -> Exclude:
        """What the rows of `query` must not see: the slots that hold their own ids, or nothing."""
        if ids is not None:
            checks.check_vector("ids", ids, len(query), torch.int64)
            checks.check_device("ids", ids, self.device)
            if self.ids is None:
                raise ValueError("bank_ids: got None with ids, wanted a (K,) int64 tensor")
        if self.ids is None:
            return NOTHING
        return Exclude(None, ops.known(ids, len(query), self.device), self._local_ids())

    def _local_ids(self) -> Tensor:
        return self.ids

    def scan(
        self,
        query: Tensor,  # (B, D)
        key: Tensor | None,  # (B, D)
        s_pos: Tensor,  # (B,)
        options: PassOptions,
        exclude: Exclude = NOTHING,
        rng_state: Tensor | None = None,
    ) -> BankPass:
        """See `psm_kernels.ops.bank_pass`."""
        rest = (options, exclude, rng_state, self.backend)
        return ops.run_pass(query, key, self.bank.detach(), self.count, s_pos, *rest)

    def topk(self, query: Tensor, k: int, exclude: Exclude = NOTHING) -> tuple[Tensor, Tensor]:
        """See `psm_kernels.ops.bank_topk`."""
        return ops.run_topk(query, self.bank, k, self.count, exclude, self.backend)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (B, k, D) of the slots index (B, k), zeros where it is -1."""
        return ops.bank_rows(self.bank, index, dtype)

    def psm_step(
        self,
        query: Tensor,
        key: Tensor,
        options: PSMOptions,
        exclude: Exclude = NOTHING,
        rng_state: Tensor | None = None,
        row_offset: int = 0,
    ) -> Tensor | None:
        """See `psm_kernels.ops.psm_step`."""
        rest = (options, exclude, rng_state, row_offset, self.backend)
        return ops.psm_step(query, key, self.bank, self.count, *rest)

    def hidden(self, exclude: Exclude) -> tuple[Tensor, Tensor]:
        """How many slots hold a row's own id (B,), and how many hold nothing ()."""
        return hidden(exclude, self.count)

    def ids_at(self, index: Tensor) -> Tensor:
        return self.ids[index.clamp_min(0)]

    def labels_at(self, index: Tensor) -> Tensor:
        return self.labels[index.clamp_min(0)]

    def seen(self, exclude: Exclude, slots: Tensor) -> Tensor:
        """(B, S) bool: which of the slots (S,) each row sees."""
        if exclude.ids is not None:  # of all slots, wherever they lie
            exclude = exclude._replace(bank_ids=self.ids)
        return exclude.seen(slots, self.count)

    def label_sums(self, labels: Tensor, exclude: Exclude = NOTHING) -> tuple[Tensor, Tensor]:
        """Sum (B, D) and number (B,) of the rows that have a row's label and that it sees, for
        labels (B,) int64; negative ones have none. O(K D): no (B, K) matrix. On a GPU the order of
        the additions is torch's, see torch.use_deterministic_algorithms."""
        args = (self.bank, self.labels, self.count, labels, exclude)
        total, number = label_sums(*args)
        return total.to(self.sums), number

    def row_ranges(self, query: Tensor, temperature: float, exclude: Exclude) -> RowRanges:
        """See `psm_kernels.weighted`, which is imported where UnReMix asks for it: registering its
        operators takes 10 ms, half of what the rest of the import does."""
        from psm_kernels.weighted import row_ranges

        options = {"temperature": temperature, "exclude": exclude, "backend": self.backend}
        return row_ranges(query, self.bank, self.count, **options)

    def weighted_pass(self, query: Tensor, temperature: float, **weights) -> WeightedPass:
        """See `psm_kernels.weighted`."""
        from psm_kernels.weighted import weighted_pass

        options = {"temperature": temperature, "backend": self.backend}
        return weighted_pass(query, self.bank, self.count, **options, **weights)


@torch.no_grad()
def hidden(exclude: Exclude, count: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the first `count` slots hold a row's own id (B,), and how many of them hold
    nothing (). Memory O(B + K)."""
    ids, bank_ids = exclude.ids, exclude.bank_ids
    place, hit = _place(bank_ids, ids)  # a slot counts for the first row of its id
    valid, nothing = torch.arange(len(bank_ids), device=ids.device) < count, bank_ids == EMPTY
    copies = torch.zeros_like(ids).scatter_add_(0, place, (hit & valid & ~nothing).long())
    return copies[_place(ids, ids)[0]], (valid & nothing).sum()


@torch.no_grad()
def label_sums(
    bank: Tensor, bank_labels: Tensor, count: Tensor, labels: Tensor, exclude: Exclude
) -> tuple[Tensor, Tensor]:
    """In fp64, so that a row's own copies can be taken away again, however many they are."""
    held = (torch.arange(len(bank), device=bank.device) < count) & (bank_labels >= 0)
    total, number = _sums(bank, bank_labels, labels, held)
    if exclude.ids is not None:  # (label, id) as one number: a sample may come with two labels
        label, alike = _place(bank_labels, labels)
        name, own = _place(exclude.bank_ids, exclude.ids)
        slots = label * len(labels) + name
        rows = _place(labels, labels)[0] * len(labels) + _place(exclude.ids, exclude.ids)[0]
        copies, times = _sums(bank, slots, rows, held & alike & own)
        total, number = total - copies, number - times
    return torch.where(number[:, None] > 0, total, 0.0), number


def _sums(bank: Tensor, held: Tensor, wanted: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum (B, D) and number (B,) of the valid (K,) rows that hold (K,) what is wanted (B,)."""
    size = len(wanted)
    place, hit = _place(held, wanted)
    place = torch.where(hit & valid, place, size)  # the others go to a scrap row
    total = torch.zeros(size + 1, bank.shape[1], dtype=torch.float64, device=bank.device)
    for start in range(0, len(bank), _SLAB):  # not the whole bank in fp64 at once
        part = slice(start, start + _SLAB)
        total.index_add_(0, place[part], bank[part].double())  # a NaN behind `count`: scrap
    number = place.new_zeros(size + 1)
    number.index_add_(0, place, torch.ones_like(place))  # bincount would wait for the device
    first, _ = _place(wanted, wanted)
    return total[first], number[first]


def _place(held: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of each held value: the first place among the sorted wanted ones, and whether it is one."""
    ordered = wanted.sort().values
    place = torch.searchsorted(ordered, held).clamp_max(len(wanted) - 1)
    return place, ordered[place] == held
