"""The ring buffer of past keys. It knows no loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psm_kernels import _checks as checks
from psm_kernels import backends


def unit_rows(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of x (N, D) divided by their norm, in `dtype`; zero rows stay zero, gradient finite.

    No eps: fp16 cannot hold the usual 1e-12, and the sum is in fp32 or better whatever comes in.
    """
    return unit_rows_and_norms(x, dtype)[0]


def unit_rows_and_norms(x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """`unit_rows` (N, D) and what it divided by (N, 1): the norms, 1 for a row of zeros."""
    x = x.to(dtype)
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    norms = norms.masked_fill(norms == 0, 1.0)
    return x / norms, norms


class MemoryBank(nn.Module):
    """A first-in first-out bank of unit keys, all of it on the device and in the state_dict.

    Buffers: `bank` (size, dim), `labels` (size,) int64 with -1 for unknown, `ptr` and `count` 0-d
    int64, the next slot to write and the number of valid slots, which are [0, count).

    A state_dict with MoCo's `queue` (dim, size) and `queue_ptr` loads as a full bank
    (facebookresearch/moco, moco/builder.py).

    Args:
        size: number of slots K.
        dim: columns D.
        dtype: fp32, bf16 or fp16 (fp64 for tests); autocast never changes it.
        device: where the buffers are made.

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
    ):
        super().__init__()
        checks.check_int("size", size, 1)
        checks.check_int("dim", dim, 1)
        if dtype not in checks.BANK_DTYPES:
            raise ValueError(f"dtype: got {dtype}, wanted one of {checks.BANK_DTYPES}")
        self._allocate(size, dim, dtype, device)
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
        self._register_load_state_dict_pre_hook(self._before_load)

    def _allocate(self, size: int, dim: int, dtype: torch.dtype, device) -> None:
        self.register_buffer("bank", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("labels", torch.full((size,), -1, device=device))

    @property
    def size(self) -> int:
        return self.bank.shape[0]

    @property
    def dim(self) -> int:
        return self.bank.shape[1]

    def check(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Raise the ValueError that `enqueue` would raise, without writing."""
        checks.check_matrix("key", keys, like="the bank", shape=(None, self.dim))
        checks.check_device("key", keys, self.bank.device)
        if labels is not None:
            checks.check_vector("labels", labels, keys.shape[0], torch.int64)
            checks.check_device("labels", labels, self.bank.device)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None, *, backend: str = "auto") -> None:
        """Write a batch behind the newest rows; of more than `size` keys the last `size` stay.

        Args:
            keys: (B, dim), any B; normalized here. A row with a NaN or an infinity is stored as
                zeros, similarity 0 to everything, so that it cannot spoil later steps.
            labels: (B,) int64 or None for unknown. They serve statistics, never the loss.
            backend: "auto" or a name of `python -m psm_kernels`; "cuda" does it in one kernel.

        Raises:
            ValueError: wrong shape, dtype or device, or the backend cannot run; nothing is written.
        """
        self.check(keys, labels)
        if isinstance(self.bank, Tensor) and not torch.compiler.is_compiling():
            own = getattr(backends.choose(backend, self.bank), "enqueue", None)
            if own is not None:
                return own(keys.detach(), labels, self.bank, self.labels, self.ptr, self.count)
        batch = keys.shape[0]
        if labels is None:
            labels = torch.full((batch,), -1, device=self.ptr.device)
        last = keys.detach()[-self.size :]
        wide = torch.float64 if self.bank.dtype is torch.float64 else torch.float32
        with torch.autocast(keys.device.type, enabled=False):
            rows = unit_rows(last, wide)
        # With a NaN or an infinity the norm is one too: what it divides is all 0 and NaN.
        rows = rows.nan_to_num_(0.0)
        slots = torch.arange(batch - rows.shape[0], batch, device=self.ptr.device)
        slots = (self.ptr + slots) % self.size
        self._write(slots, rows.to(self.bank.dtype), labels[-self.size :])
        self.ptr.copy_((self.ptr + batch) % self.size)
        self.count.copy_((self.count + batch).clamp_max(self.size))

    def _write(self, slots: Tensor, rows: Tensor, labels: Tensor) -> None:
        self.bank.index_copy_(0, slots, rows)
        self.labels.index_copy_(0, slots, labels)

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the bank."""
        self.bank.zero_()
        self.labels.fill_(-1)
        self.ptr.zero_()
        self.count.zero_()

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, dtype={self.bank.dtype}"

    def _before_load(self, state_dict, prefix, *unused) -> None:
        """Translate MoCo's names, then refuse another size before anything is copied."""
        if isinstance(self.bank, Tensor):
            for name in ("bank", "labels"):
                if hasattr(state_dict.get(prefix + name), "to_local"):  # a DTensor
                    raise ValueError(
                        f"{name}: the checkpoint is of a sharded bank, this one is whole: save "
                        "psm_kernels.checkpoint.full_state_dict(module), called on every rank"
                    )
        if prefix + "queue" in state_dict:
            queue = state_dict.pop(prefix + "queue")
            pointer = state_dict.pop(prefix + "queue_ptr", torch.zeros(1, dtype=torch.int64))
            if tuple(queue.shape) != (self.dim, self.size):
                got, wanted = tuple(queue.shape), (self.dim, self.size)
                raise ValueError(f"queue: got shape (D, K) = {got}, wanted {wanted}")
            state_dict[prefix + "bank"] = queue.T.contiguous()
            state_dict[prefix + "ptr"] = pointer.reshape(())
            state_dict[prefix + "count"] = torch.full_like(state_dict[prefix + "ptr"], self.size)
        loaded = state_dict.get(prefix + "bank")
        if loaded is None:
            return
        got, wanted = tuple(loaded.shape), (self.size, self.dim)
        if got != wanted:
            raise ValueError(f"bank: the checkpoint has (K, D) = {got}, this bank {wanted}")
        state_dict.setdefault(prefix + "labels", torch.full((self.size,), -1))
