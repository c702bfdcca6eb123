"""What every loss shares: the bank, the noise state, settings that may change, when to enqueue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from psm_kernels import checks
from psm_kernels import backends, functional
from psm_kernels._autograd import refuse_recompute
from psm_kernels.distributed import ShardedBank, agree, gather, rank_and_world
from psm_kernels.memory_bank import MemoryBank
from psm_kernels.ops import check_backend
from psm_kernels.state import HeldState


class SharedOptions(TypedDict, total=False):
    """What every loss takes by keyword, as in `PSMLoss`."""

    reduction: str
    bank_dtype: torch.dtype
    indexed_bank: bool
    gather_distributed: bool
    shard_bank: bool
    process_group: dist.ProcessGroup | None
    seed: int
    backend: str


class BankLoss(HeldState):
    """A loss of (query, key) with a memory bank, or within the batch.

    The bank is read before it is written, so a batch is never its own negative. Settings are
    attributes that may change at any time, such as a scheduled `temperature`; what shapes the bank
    is fixed. `memory_bank_size=0` (lightly's word) is the in-batch form, where both views carry
    gradient, `memory_bank` is None and nothing is enqueued.
    """

    _has_in_batch_form = True
    _fixed = (
        *("memory_bank_size", "bank_dtype", "indexed_bank"),
        *("gather_distributed", "shard_bank", "process_group"),
    )

    def __init__(
        self,
        temperature: float,
        memory_bank_size: tuple[int, int] | int,
        settings: dict[str, Any],
        *,
        reduction: str = "mean",
        bank_dtype: torch.dtype = torch.float32,
        indexed_bank: bool = False,
        gather_distributed: bool = False,
        shard_bank: bool = False,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        backend: str = "auto",
    ):
        super().__init__()
        self.process_group, self.collective = process_group, gather_distributed or shard_bank
        if self.collective:
            rank_and_world(process_group)  # refuses a group that this rank is not in
        options = {"dtype": bank_dtype, "indexed": indexed_bank}
        self.memory_bank = self._make_bank(memory_bank_size, shard_bank, options)
        self._settings = tuple(settings)
        shared = {"temperature": temperature, "reduction": reduction}
        self._check(seed=seed, backend=backend, **shared, **settings)
        for name, value in {"seed": seed, "backend": backend, **shared, **settings}.items():
            super().__setattr__(name, value)
        self._draws = 0  # calls that took noise since the state was set: equal on all ranks
        self.hold("rng_state", torch.tensor([seed, 0]))
        self._register_load_state_dict_pre_hook(self._before_load)

    # --- settings ---

    def _check_settings(self, **settings: Any) -> None:
        """Raise the ValueError of the first wrong setting of the method."""
        raise NotImplementedError

    def _check(self, *, seed: int, backend: str, **settings: Any) -> None:
        checks.check_int("seed", seed, -(2**63), 2**63 - 1)
        backends.require(backend)
        self._check_settings(**settings)

    @property
    def settings(self) -> dict[str, Any]:
        """By name, the method's own."""
        return {name: getattr(self, name) for name in self._settings}

    def _call(self) -> dict[str, Any]:
        """By name, what the functional twin is called with."""
        names = ("temperature", "reduction", "backend", *self._settings)
        return {name: getattr(self, name) for name in names}

    def __setattr__(self, name: str, value: Any) -> None:
        if "rng_state" not in self.__dict__:  # not made yet
            return super().__setattr__(name, value)
        if name in self._fixed:
            raise ValueError(f"{name}: got {value!r} for a loss that exists, wanted a new loss")
        now = self._call() | {"seed": self.seed}
        if name in now:
            self._check(**now | {name: value})
        super().__setattr__(name, value)
        if name == "seed":
            self.reset_noise()

    def extra_repr(self) -> str:
        words = {name: value for name, value in self._call().items() if name != "backend"}
        return ", ".join(f"{name}={value!r}" for name, value in words.items())

    # --- state ---

    def _make_bank(
        self, memory_bank_size: tuple[int, int] | int, shard_bank: bool, options: dict[str, Any]
    ) -> MemoryBank | None:
        none = not isinstance(memory_bank_size, Sequence) and memory_bank_size == 0
        if none and self._has_in_batch_form:
            if self.collective or options["indexed"]:
                raise ValueError(
                    "memory_bank_size: got 0 with gather_distributed, shard_bank or indexed_bank, "
                    "wanted (rows, columns): negatives within the batch are this rank's own"
                )
            return None
        pair = isinstance(memory_bank_size, Sequence) and not isinstance(memory_bank_size, str)
        if not pair or len(memory_bank_size) != 2:
            rows = checks.as_int(memory_bank_size)
            rows = rows if isinstance(rows, int) and rows > 1 else 16384
            got = f"{memory_bank_size!r}, wanted (rows, columns), such as ({rows}, 128)"
            raise ValueError(f"memory_bank_size: got {got}")
        size, dim = map(checks.as_int, memory_bank_size)
        checks.check_int("memory_bank_size[0]", size, 1)
        checks.check_int("memory_bank_size[1]", dim, 1)
        if shard_bank:
            return ShardedBank(size, dim, process_group=self.process_group, **options)
        return MemoryBank(size, dim, **options)

    @torch.no_grad()
    def reset_noise(self) -> None:
        """The noise of a new loss: state [seed, 0]."""
        self._draws = 0
        self.rng_state.copy_(torch.tensor([self.seed, 0]))

    def restore(self, name: str, loaded: Tensor) -> None:
        super().restore(name, loaded)
        self._draws = 0

    def reset_parameters(self) -> None:
        """An empty bank and the noise of a new loss, also for state made on the meta device."""
        self.reset_noise()
        if self.memory_bank is not None:
            self.memory_bank.reset()

    def _before_load(self, state_dict, prefix, *unused) -> None:
        """A MoCo checkpoint has `queue` and `queue_ptr` on the model: hand them to the bank. Sizes
        are refused here, before anything is copied."""
        if self.memory_bank is None:
            return
        for name in ("queue", "queue_ptr"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}memory_bank.{name}"] = state_dict.pop(prefix + name)
                state_dict.setdefault(prefix + "rng_state", self.rng_state)
        self.memory_bank._before_load(state_dict, prefix + "memory_bank.")

    # --- a step ---

    def enqueue(
        self, key: Tensor, labels: Tensor | None = None, *, ids: Tensor | None = None
    ) -> None:
        """Write keys (B, D) into the bank: once per optimizer step when accumulating gradients.
        With `gather_distributed` or `shard_bank`, on every rank: all ranks' keys in rank order.

        Args:
            key: of any length; labels, ids: (B,) int64, as in `forward`.
        """
        if self.memory_bank is None:
            raise ValueError("memory_bank_size: got 0, wanted (rows, columns), for a bank to write")
        self._check_write(key, labels, ids)
        self._write(key, labels, ids)

    def _check_write(self, key: Tensor, labels: Tensor | None, ids: Tensor | None) -> None:
        """Raise the ValueError that an enqueue would raise: on all ranks, where they gather."""
        if self.collective:
            agree(self.process_group, lambda: self._facts(key, labels, ids))
        else:
            self.memory_bank.check(key, labels, ids)

    def symmetric(
        self,
        query1: Tensor,
        key2: Tensor,
        query2: Tensor,
        key1: Tensor,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        update: bool | None = None,
        enqueue_both: bool = False,
        **options: Any,
    ):
        """Both directions of two views, each against the bank as it was: their mean loss.

        `criterion(query1, key2) + criterion(query2, key1)` would compare the second queries with
        their own samples, just enqueued. Here nothing is written before both are known; with a bank
        they share one pass over it.

        Args:
            query1, key2: (B, D), the first direction; query2, key1: the second. Rows are the same
                samples in all four.
            labels, ids, update: as in `forward`, (B,).
            enqueue_both: write key2, then key1; without it key2 alone.
            options: further arguments of `forward`; `projection` as a pair for the two queries.

        Returns:
            What `forward` returns of 2B rows, the two directions of each sample side by side.
        """
        bank = self.memory_bank
        if update and bank is None:
            raise ValueError("update: got True, wanted None or False: memory_bank_size is 0")
        update = self._learns() and bank is not None if update is None else update
        if update:  # before anything is computed: a failed call leaves all as it was
            self._check_write(key2, labels, ids)
        pairs = {n: pair for n, pair in options.items() if isinstance(pair, tuple)}
        pairs |= {n: (x, x) for n, x in (("labels", labels), ("ids", ids)) if x is not None}
        options = {"update": False, **options}
        if self._rows_are_apart():
            options |= {name: alternate(pair) for name, pair in pairs.items()}
            result = self(alternate((query1, query2)), alternate((key2, key1)), **options)
        else:
            calls = ((query1, key2), (query2, key1))
            parts = [{name: pair[n] for name, pair in pairs.items()} for n in (0, 1)]
            results = [self(*c, **options | part) for c, part in zip(calls, parts, strict=True)]
            result = self._joined(results)
        if update:
            for key in (key2, key1) if enqueue_both else (key2,):
                self._write(key, labels, ids)
        return result

    def _rows_are_apart(self) -> bool:
        """Whether a row's loss is the same in any batch."""
        return self.memory_bank is not None

    def _joined(self, losses: list[Tensor]) -> Tensor:
        """The results of two directions as one."""
        if self.reduction == "none":
            return alternate(losses)
        return getattr(torch.stack(losses), self.reduction)(0)

    def _learns(self) -> bool:
        """Whether a call is a step of training: it enqueues and takes noise of its own."""
        return self.training and torch.is_grad_enabled()

    def _start(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor | None,
        ids: Tensor | None,
        update: bool | None,
        projection: Tensor | None = None,
        **flags: bool,
    ) -> tuple[bool, dict[str, Any]]:
        """Before a forward: check, together with the other ranks where they will exchange rows.
        Returns whether to enqueue afterwards, and what the functional twin gets of the state."""
        bank, process_group = self.memory_bank, self.process_group
        noise = self._noise(0)
        if bank is not None or noise:  # what moves a state on cannot be run again
            refuse_recompute(self.rng_state)
        if bank is None:
            if update:
                raise ValueError("update: got True, wanted None or False: memory_bank_size is 0")
            return False, {"ids": ids} | noise
        update = self._learns() if update is None else update

        def facts() -> dict[str, object]:
            functional.check_pair(query, key, bank.bank, projection)
            check_backend(self.backend, bank.bank)
            mine = {"query dtype": str(query.dtype), "update": update, "seed": self.seed}
            mine |= {"calls so far": self._draws}  # a rank that trained alone has other noise
            return self._facts(key, labels, ids, update) | mine | flags

        rank = 0
        if not self.collective:
            bank.check(key, labels, ids, write=update)
        else:
            rank = rank_and_world(process_group)[0]
            if update or isinstance(bank, ShardedBank):
                agree(process_group, facts)
            else:
                facts()
        known = ids is not None or bank.indexed
        state = {"bank": bank.bank, "count": bank.extent}
        state |= {"ids": ids, "bank_ids": bank.ids if known else None}
        return update, state | self._noise(rank * len(key))

    def _noise(self, row_offset: int) -> dict[str, Any]:
        """Arguments of a twin that draws noise."""
        return {}

    def _finish(self, key: Tensor, labels: Tensor | None, ids: Tensor | None, update: bool) -> None:
        """After a successful forward: the next noise offset, and the keys into the bank. An
        evaluation leaves the noise as it is, so that it neither changes nor depends on a run."""
        if update or self._learns():
            with torch.no_grad():
                self.rng_state[1] += 1
            if self.collective:
                self._draws += 1
        if update:
            self._write(key, labels, ids)

    def _facts(
        self, key: Tensor, labels: Tensor | None, ids: Tensor | None, update: bool = True
    ) -> dict[str, object]:
        """Check what will be enqueued; what must be equal on all ranks."""
        self.memory_bank.check(key, labels, ids, write=update)
        return {
            "batch size": len(key),
            "key dtype": str(key.dtype),
            "labels given": labels is not None,
            "ids given": ids is not None,
            "memory_bank": self.memory_bank.extra_repr(),
            "settings": self.extra_repr(),
        }

    def _write(self, key: Tensor, labels: Tensor | None, ids: Tensor | None) -> None:
        if self.collective:
            rows = (key, labels, ids)
            rows = [None if x is None else gather(x, self.process_group) for x in rows]
            key, labels, ids = rows
        self.memory_bank.enqueue(key, labels, ids=ids, backend=self.backend)


def alternate(pair: Sequence[Tensor]) -> Tensor:
    """(B, ...) twice -> (2B, ...), row by row: a sample's place, hence its noise, is that of one
    process however many there are."""
    return torch.stack(tuple(pair), 1).flatten(0, 1)


class PairLoss(BankLoss):
    """What the methods beside PSM share: a functional twin that takes (query, key, bank)."""

    _twin: Any  # the function in `psm_kernels.functional`

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        update: bool | None = None,
    ) -> Tensor:
        """Loss of query (B, D) against key (B, D) and the negatives; then the keys are enqueued.

        Args:
            query: carries gradient; key: from the momentum encoder, or the other view in-batch.
            labels: (B,) int64, kept with the keys in the bank.
            ids: (B,) int64 names of the samples, kept with the keys in the bank: a slot that holds
                a row's own id is no negative of it. Negative: unknown.
            update: whether to enqueue; None: when training and grad mode is on.

        Returns:
            The loss, fp32: 0-d, or (B,) for reduction="none".
        """
        update, state = self._start(query, key, labels, ids, update)
        loss = self._twin(query, key, **self._call(), **state)
        self._finish(key, labels, ids, update)
        return loss
