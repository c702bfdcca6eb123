"""The bank of past keys. It knows no loss."""

from __future__ import annotations

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels._autograd import refuse_transforms
from psm_kernels.backends import registry
from psm_kernels.backends.base import EMPTY
from psm_kernels.bank.state import HeldState
from psm_kernels.bank.view import BankView
from psm_kernels.rows import unit_rows, unit_rows_and_norms, wide


class MemoryBank(HeldState):
    """A bank of unit keys, all of it on the device and in the state_dict.

    Without `indexed` it is a ring, first in, first out. With it slot i holds sample i: a key
    rewrites the row of its id where it stands, the bank of a whole data set with each image once.

    State: `bank` (size, dim); `labels` (size,) int64, -1 for unknown; `ids` (size,) int64, -1 for
    unknown, -2 in slots of an indexed bank that hold nothing yet; `ptr` and `count` 0-d int64, the
    next slot to write and the number of slots written. Those of a ring are [0, count).

    A state_dict with MoCo's `queue` (dim, size) and `queue_ptr` loads as a full bank
    (facebookresearch/moco, moco/builder.py).

    Args:
        size: number of slots K.
        dim: columns D.
        dtype: fp32, bf16 or fp16 (fp64 for tests); autocast never changes it.
        device: where the state is made.
        indexed: slot = id.
        momentum: of an indexed bank, in [0, 1): a row becomes the unit vector of momentum x old +
            (1 - momentum) x new (arXiv 1805.01978 has 0.5); 0 replaces it.

    Raises:
        ValueError: an argument is wrong, or a loaded bank has another size.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        indexed: bool = False,
        momentum: float = 0.0,
    ):
        super().__init__()
        checks.check_int("size", size, 1)
        checks.check_int("dim", dim, 1)
        checks.check_option("indexed", indexed, (False, True))
        checks.check_number("momentum", momentum, least=0, below=1)
        if momentum and not indexed:
            raise ValueError(f"momentum: got {momentum}, wanted 0 for a bank that is not indexed")
        if dtype not in checks.BANK_DTYPES:
            raise ValueError(f"dtype: got {dtype}, wanted one of {checks.BANK_DTYPES}")
        self.indexed, self.momentum = indexed, momentum
        self._allocate(size, dim, dtype, device)
        self.hold("ptr", torch.zeros((), dtype=torch.int64, device=device))
        self.hold("count", torch.zeros((), dtype=torch.int64, device=device))
        self._register_load_state_dict_pre_hook(self._before_load)
        self.reset_parameters()

    def _allocate(self, size: int, dim: int, dtype: torch.dtype, device) -> None:
        self.hold("bank", torch.empty(size, dim, dtype=dtype, device=device))
        self.hold("labels", torch.empty(size, dtype=torch.int64, device=device))
        self.hold("ids", torch.empty(size, dtype=torch.int64, device=device))

    def _stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """This process's rows (K, D), labels (K,) and ids (K,)."""
        return self.bank, self.labels, self.ids

    @property
    def size(self) -> int:
        return self.bank.shape[0]

    @property
    def dim(self) -> int:
        return self.bank.shape[1]

    @property
    def extent(self) -> Tensor:
        """0-d int64: what is written lies in slots [0, extent); `ids` tells which of them of an
        indexed bank are empty."""
        return torch.full_like(self.count, self.size) if self.indexed else self.count

    def view(self, *, ids: bool = True, backend: str = "auto") -> BankView:
        """What a loss reads now; `ids`: with the names of what it holds, so that rows do not see
        their own copies. An indexed bank needs them to tell which slots are empty."""
        known = self.ids if ids or self.indexed else None
        return self._view(self.bank, self.extent, known, self.labels, backend)

    def _view(self, *args) -> BankView:
        return BankView(*args)

    def copies(self, ids: Tensor) -> Tensor:
        """How many slots hold each of the samples ids (B,); 0 for negative, unknown ones.
        Collective where the bank is sharded."""
        view = self.view()
        return view.hidden(view.own_copies(ids, ids))[0]

    def check(
        self,
        keys: Tensor,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        *,
        write: bool = True,
    ) -> None:
        """Raise the ValueError that `enqueue` would raise, without writing. `write`: whether the
        keys are to be enqueued, for which an indexed bank wants ids that are its slots."""
        checks.check_matrix("key", keys, like="the bank", shape=(None, self.dim))
        checks.check_device("key", keys, self.ptr.device)
        for name, value in (("labels", labels), ("ids", ids)):
            if value is not None:
                checks.check_vector(name, value, keys.shape[0], torch.int64)
                checks.check_device(name, value, self.ptr.device)
        if self.indexed and write:
            self._check_slots(ids)

    def _check_slots(self, ids: Tensor | None) -> None:
        if ids is None:
            raise ValueError("ids: got None, wanted (B,) int64 slots, because the bank is indexed")
        # A GPU's values are not waited for: it asserts where they are used as an index.
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ids[(ids < 0) | (ids >= self.size)]
            if len(wrong):
                raise ValueError(
                    f"ids: got {int(wrong[0])}, wanted 0 to {self.size - 1}, the bank's slots"
                )

    def enqueue(
        self,
        keys: Tensor,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        backend: str = "auto",
        rng_state: Tensor | None = None,
    ) -> None:
        """Write a batch behind the newest rows; of more than `size` keys the last `size` stay.
        An indexed bank writes each to the slot of its id; of several with one id the last.

        Args:
            keys: (B, dim), any B; normalized here. A row with a NaN or an infinity is stored as
                zeros, similarity 0 to everything, so that it cannot spoil later steps.
            labels: (B,) int64 or None for unknown. They serve statistics, never the loss.
            ids: (B,) int64 names of the samples, so that a query never meets its own copy; None or
                negative for unknown. An indexed bank needs them, in [0, size).
            backend: "auto" or a name of `python -m psm_kernels`; "cpp" and "cuda" write a ring of
                fp32, bf16 or fp16 in one call.
            rng_state: (2,) int64, the noise of a loss whose step ends here: its offset goes on by
                one, in the same launch.

        Raises:
            ValueError: wrong shape, dtype, device or id, or the backend cannot run; nothing is
                written.
            RuntimeError: a ring under torch.jit.trace, torch.func or forward-mode AD.
        """
        self.check(keys, labels, ids)
        bank = self.bank
        if not self.indexed and isinstance(bank, Tensor) and not torch.compiler.is_compiling():
            refuse_transforms(keys)
            own = registry.choose(backend, bank)
            state = (bank, self.labels, self.ids, self.ptr, self.count)
            if own.enqueue(keys.detach(), labels, ids, *state, rng_state):
                return
        self._enqueue(keys, labels, ids)
        if rng_state is not None:
            rng_state[1:].add_(1)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor, labels: Tensor | None, ids: Tensor | None) -> None:
        batch = keys.shape[0]
        unknown = torch.full((batch,), -1, device=self.ptr.device)
        labels = unknown if labels is None else labels
        ids = unknown if ids is None else ids.clamp_min(-1)
        keep = slice(None) if self.indexed else slice(-self.size, None)
        with torch.autocast(keys.device.type, enabled=False):
            rows = unit_rows(keys.detach()[keep], wide(self.bank))
        # With a NaN or an infinity the norm is one too: what it divides is all 0 and NaN.
        rows = rows.nan_to_num_(0.0)
        if self.indexed:
            self._rewrite(rows, labels, ids)
            return
        slots = torch.arange(batch - rows.shape[0], batch, device=self.ptr.device)
        self._write((self.ptr + slots) % self.size, rows, labels[keep], ids[keep])
        self.ptr.copy_((self.ptr + batch) % self.size)
        self.count.copy_((self.count + batch).clamp_max(self.size))

    def _rewrite(self, rows: Tensor, labels: Tensor, ids: Tensor) -> None:
        # Copies of an id all carry the last one's values: the order of writing does not matter.
        ordered, order = ids.sort(stable=True)
        last = order[torch.searchsorted(ordered, ids, right=True) - 1]
        rows, labels = rows[last], labels[last]
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        fresh = self.ids[ids] == EMPTY
        if self.momentum:
            before = self.bank[ids].to(rows.dtype)
            mixed = unit_rows(self.momentum * before + (1 - self.momentum) * rows, rows.dtype)
            rows = torch.where(fresh[:, None], rows, mixed)
        self._write(ids, rows, labels, ids)
        self.count.add_((first & fresh[order]).sum())

    def _write(self, slots: Tensor, rows: Tensor, labels: Tensor, ids: Tensor) -> None:
        bank, known_labels, known_ids = self._stored()
        bank.index_copy_(0, slots, rows.to(bank.dtype))
        known_labels.index_copy_(0, slots, labels)
        known_ids.index_copy_(0, slots, ids)

    def from_queue(self, queue: Tensor, pointer: Tensor | None = None) -> dict[str, Tensor]:
        """The state of a full bank out of MoCo's `queue` (dim, size), normalized, and `queue_ptr`.

        Raises:
            ValueError: another shape, or an indexed bank.
        """
        if queue.ndim == 3:
            raise ValueError(
                f"queue: got shape {tuple(queue.shape)}, the queues of two views as solo-learn has "
                f"them, wanted (D, K) = {(self.dim, self.size)}: one of them"
            )
        if tuple(queue.shape) != (self.dim, self.size):
            got, wanted = tuple(queue.shape), (self.dim, self.size)
            raise ValueError(f"queue: got shape (D, K) = {got}, wanted {wanted}")
        if self.indexed:
            raise ValueError("queue: got one for an indexed bank, wanted a ring")
        unknown = torch.full((self.size,), -1, device=queue.device)
        pointer = unknown.new_zeros(1) if pointer is None else pointer
        unit, norms = unit_rows_and_norms(queue.T)
        return {
            "bank": torch.where((norms - 1).abs() < 1e-3, queue.T, unit),  # unit rows as they are
            "labels": unknown,
            "ids": unknown.clone(),
            "ptr": pointer.reshape(()),
            "count": torch.full_like(pointer.reshape(()), self.size),
        }

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the bank."""
        bank, labels, ids = self._stored()
        bank.zero_()
        labels.fill_(-1)
        ids.fill_(EMPTY if self.indexed else -1)
        self.ptr.zero_()
        self.count.zero_()

    def reset_parameters(self) -> None:
        """`reset`, by the name under which state made on the meta device is initialized."""
        self.reset()

    def extra_repr(self) -> str:
        kind = f", indexed=True, momentum={self.momentum}" if self.indexed else ""
        return f"size={self.size}, dim={self.dim}, dtype={self.bank.dtype}{kind}"

    def _before_load(self, state_dict, prefix, *unused) -> None:
        """Translate MoCo's names, then refuse another size before anything is copied."""
        if isinstance(self.bank, Tensor):
            for name in ("bank", "labels"):
                if hasattr(state_dict.get(prefix + name), "to_local"):  # a DTensor
                    raise ValueError(
                        f"{name}: the checkpoint is of a sharded bank, this one is whole: save "
                        "psm_kernels.training.checkpoint.full_state_dict(module) on every rank"
                    )
        if prefix + "queue" in state_dict:
            found = state_dict.pop(prefix + "queue"), state_dict.pop(prefix + "queue_ptr", None)
            state_dict |= {prefix + n: x for n, x in self.from_queue(*found).items()}
        loaded = state_dict.get(prefix + "bank")
        if loaded is None:
            return
        got, wanted = tuple(loaded.shape), (self.size, self.dim)
        if got != wanted:
            raise ValueError(f"bank: the checkpoint has (K, D) = {got}, this bank {wanted}")
        if self.indexed and prefix + "ids" not in state_dict:
            raise ValueError("ids: the checkpoint has none, wanted those of an indexed bank")
        for name in ("labels", "ids"):  # a queue has neither, a bank of version 0.1 no ids
            state_dict.setdefault(prefix + name, torch.full((self.size,), -1))
        self._check_kind(state_dict[prefix + "ids"])

    def _check_kind(self, ids: Tensor) -> None:
        """Refuse the ids of the other kind of bank: its rows stand elsewhere."""
        is_shard = hasattr(ids, "to_local")  # a DTensor, of whose slots this rank knows its own
        held = ids.to_local() if is_shard else ids
        slots = held if is_shard else torch.arange(len(held), device=held.device)
        if self.indexed and ((held == -1) | ((held != slots) & (held != EMPTY))).any():
            raise ValueError("ids: the checkpoint is of a ring, this bank is indexed")
        if not self.indexed and (held == EMPTY).any():
            raise ValueError("ids: the checkpoint is of an indexed bank, this one is a ring")
