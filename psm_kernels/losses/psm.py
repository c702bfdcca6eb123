"""PSM as a module, and what it shares with its kin: check, call the functional twin, enqueue."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from psm_kernels import _checks as checks
from psm_kernels import functional
from psm_kernels._autograd import refuse_recompute
from psm_kernels.distributed import ShardedBank, agree, gather, rank_and_world
from psm_kernels.memory_bank import MemoryBank
from psm_kernels.ops import check_backend
from psm_kernels.stats import PSMOutput


class BankLoss(nn.Module):
    """What every loss with a memory bank shares: the bank, the noise state, when to enqueue.

    The bank is read before it is written, so a batch is never its own negative.
    """

    def __init__(
        self,
        temperature: float,
        memory_bank_size: tuple[int, int],
        *,
        reduction: str = "mean",
        bank_dtype: torch.dtype = torch.float32,
        gather_distributed: bool = False,
        shard_bank: bool = False,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        backend: str = "auto",
    ):
        super().__init__()
        checks.check_number("temperature", temperature, above=0)
        checks.check_option("reduction", reduction, functional.REDUCTIONS)
        checks.check_int("seed", seed, -(2**63), 2**63 - 1)
        self.temperature, self.reduction, self.backend = temperature, reduction, backend
        self.seed, self.process_group = seed, process_group
        self.collective = gather_distributed or shard_bank
        if self.collective:
            rank_and_world(process_group)  # refuses a group that this rank is not in
        self.memory_bank = self._make_bank(memory_bank_size, bank_dtype, shard_bank)
        self.register_buffer("rng_state", torch.tensor([seed, 0]))
        self._register_load_state_dict_pre_hook(self._before_load)

    def _make_bank(
        self, memory_bank_size: tuple[int, int], dtype: torch.dtype, shard_bank: bool = False
    ) -> MemoryBank:
        pair = isinstance(memory_bank_size, Sequence) and not isinstance(memory_bank_size, str)
        if not pair or len(memory_bank_size) != 2:
            rows = checks.as_int(memory_bank_size)
            rows = rows if isinstance(rows, int) and rows > 1 else 16384
            raise ValueError(
                f"memory_bank_size: got {memory_bank_size!r}, wanted (rows, columns), such as "
                f"({rows}, 128)"
            )
        size, dim = map(checks.as_int, memory_bank_size)
        checks.check_int("memory_bank_size[0]", size, 1)
        checks.check_int("memory_bank_size[1]", dim, 1)
        if shard_bank:
            return ShardedBank(size, dim, dtype=dtype, process_group=self.process_group)
        return MemoryBank(size, dim, dtype=dtype)

    def enqueue(self, key: Tensor, labels: Tensor | None = None) -> None:
        """Write keys (B, D) into the bank: once per optimizer step when accumulating gradients.
        With `gather_distributed` or `shard_bank`, on every rank: all ranks' keys in rank order."""
        if self.collective:
            agree(self.process_group, lambda: self._facts(key, labels))
        self._write(key, labels)

    def _start(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor | None,
        update: bool | None,
        projection: Tensor | None = None,
        **flags: bool,
    ) -> tuple[bool, int]:
        """Before a forward: check, together with the other ranks where they will exchange rows.
        Returns whether to enqueue afterwards, and the global index of this rank's first row."""
        refuse_recompute(self.rng_state)
        bank, process_group = self.memory_bank, self.process_group
        update = self.training and torch.is_grad_enabled() if update is None else update
        if not self.collective:
            bank.check(key, labels)
            return update, 0

        def facts() -> dict[str, object]:
            functional.check_pair(query, key, bank.bank, projection)
            check_backend(self.backend, bank.bank)
            mine = {"query dtype": str(query.dtype), "update": update, "seed": self.seed}
            return self._facts(key, labels) | mine | flags

        if update or isinstance(bank, ShardedBank):
            agree(process_group, facts)
        else:
            facts()
        return update, rank_and_world(process_group)[0] * len(key)

    def _finish(self, key: Tensor, labels: Tensor | None, update: bool) -> None:
        """After a successful forward: the next noise offset, and the keys into the bank."""
        with torch.no_grad():
            self.rng_state[1] += 1
        if update:
            self._write(key, labels)

    def _facts(self, key: Tensor, labels: Tensor | None) -> dict[str, object]:
        """Check what will be enqueued; what must be equal on all ranks."""
        self.memory_bank.check(key, labels)
        return {
            "batch size": len(key),
            "key dtype": str(key.dtype),
            "labels given": labels is not None,
            "memory_bank": self.memory_bank.extra_repr(),
            "settings": self.extra_repr(),
        }

    def _write(self, key: Tensor, labels: Tensor | None) -> None:
        if self.collective:
            key = gather(key, self.process_group)
            labels = None if labels is None else gather(labels, self.process_group)
        self.memory_bank.enqueue(key, labels, backend=self.backend)

    def _before_load(self, state_dict, prefix, *unused) -> None:
        """A MoCo checkpoint has `queue` and `queue_ptr` on the model: hand them to the bank. Sizes
        are refused here, before anything is copied."""
        for name in ("queue", "queue_ptr"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}memory_bank.{name}"] = state_dict.pop(prefix + name)
                state_dict.setdefault(prefix + "rng_state", self.rng_state)
        self.memory_bank._before_load(state_dict, prefix + "memory_bank.")

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


class PSMLoss(BankLoss):
    """PSM with its own memory bank (arXiv 2311.00358); not the stereo-matching loss of that name.

    Arguments of the mining and the formula: `psm_kernels.functional.psm_loss`.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D).
        topk, a, b, selection, soft_weights, weight_temperature, hard_weight, negatives: see there.
        reduction: "mean" | "sum" | "none".
        bank_dtype: fp32, bf16 or fp16; bf16 halves the bank and its reading time. Sums are fp32.
        gather_distributed: enqueue the keys of all ranks in rank order; every rank holds the same
            bank. Calls that enqueue need the same batch size everywhere (drop_last=True). DDP's
            mean of the gradients is that of the whole batch's mean loss: scale nothing.
        shard_bank: each rank holds 1/world of the slots and all search all of them, so that every
            call runs on all ranks. Loss and gradient are those of one process with the whole batch.
        process_group: of both, None for the default group. Without torch.distributed
            `gather_distributed` does nothing, `shard_bank` is refused.
        seed: of the canonical noise, the same on all ranks; the state [seed, offset] is the buffer
            `rng_state`.
        backend: "auto" or a name of `python -m psm_kernels`.

    Example:
        >>> criterion = PSMLoss(0.2, (65536, 128))
        >>> loss = criterion(query, key)  # reads the bank, then enqueues the keys

    Raises:
        ValueError: an argument is wrong; bank and noise state are as before.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: tuple[int, int] = (16384, 128),
        *,
        topk: int = 5,
        a: float = 0.5,
        b: float = 0.0,
        selection: str = "bernoulli",
        soft_weights: str = "attention",
        weight_temperature: float = 1.0,
        hard_weight: float = 1.0,
        negatives: str = "bank",
        reduction: str = "mean",
        bank_dtype: torch.dtype = torch.float32,
        gather_distributed: bool = False,
        shard_bank: bool = False,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        backend: str = "auto",
    ):
        super().__init__(
            temperature,
            memory_bank_size,
            reduction=reduction,
            bank_dtype=bank_dtype,
            gather_distributed=gather_distributed,
            shard_bank=shard_bank,
            process_group=process_group,
            seed=seed,
            backend=backend,
        )
        self.settings = {
            "topk": topk,
            "a": a,
            "b": b,
            "selection": selection,
            "soft_weights": soft_weights,
            "weight_temperature": weight_temperature,
            "hard_weight": hard_weight,
            "negatives": negatives,
        }
        functional.check_psm_settings(
            temperature=temperature,
            reduction=reduction,
            size=self.memory_bank.size,
            **self.settings,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        projection: Tensor | None = None,
        labels: Tensor | None = None,
        update: bool | None = None,
        return_stats: bool = False,
    ) -> Tensor | PSMOutput:
        """Loss of query (B, D) against key (B, D) and the bank; then the keys are enqueued.

        Args:
            query: carries gradient; key: from the momentum encoder.
            projection: (B, D) for the attention weights, default `query`.
            labels: (B,) int64, kept with the keys and used by statistics alone.
            update: whether to enqueue; None: when training and grad mode is on.
            return_stats: return PSMOutput(loss, stats).

        Returns:
            The loss, fp32: 0-d, or (B,) for reduction="none".
        """
        update, row_offset = self._start(
            query, key, labels, update, projection, return_stats=return_stats
        )
        result = functional.psm_loss(
            query,
            key,
            self.memory_bank.bank,
            count=self.memory_bank.count,
            temperature=self.temperature,
            projection=projection,
            rng_state=self.rng_state,
            row_offset=row_offset,
            reduction=self.reduction,
            labels=labels,
            bank_labels=self.memory_bank.labels if return_stats else None,
            return_stats=return_stats,
            backend=self.backend,
            **self.settings,
        )
        if return_stats:
            _, world = rank_and_world(self.process_group) if self.collective else (0, 1)
            age = self.memory_bank.count.float() / (world * len(key))
            result = result._replace(stats=dataclasses.replace(result.stats, bank_age=age))
        self._finish(key, labels, update)
        return result

    def extra_repr(self) -> str:
        chosen = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{super().extra_repr()}, {chosen}"
