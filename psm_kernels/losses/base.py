"""What every loss module shares: the bank, the noise state, settings that may change, when to
enqueue."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from psm_kernels import checks
from psm_kernels._autograd import refuse_recompute
from psm_kernels.backends import registry
from psm_kernels.bank import BankView, MemoryBank, ShardedBank
from psm_kernels.bank.collectives import agree, gather, rank_and_world
from psm_kernels.bank.state import HeldState
from psm_kernels.losses.common import check_pair
from psm_kernels.options import ContrastiveOptions, LossOptions, with_fields

_OWN: Any = object()  # the method's own default


class _Signature:
    """Of a loss: what its __init__ takes, with the method's settings and defaults. Made when it is
    asked for, which an import does not."""

    def __get__(self, loss: BankLoss | None, cls: type[BankLoss]) -> inspect.Signature:
        own = vars(cls.Options()) | {"memory_bank_size": cls.memory_bank_size}
        takes = dict(inspect.signature(cls.__init__).parameters)
        if cls.__init__ is not BankLoss.__init__:  # whose **settings go on to it
            shared = inspect.signature(BankLoss.__init__).parameters.items()
            takes |= {n: p for n, p in shared if p.kind is p.KEYWORD_ONLY and n not in takes}
        takes = [p.replace(default=own.get(n)) if p.default is _OWN else p
                 for n, p in takes.items() if n != "self"]  # fmt: skip
        takes.sort(key=lambda p: p.kind)  # **settings behind all others
        return with_fields(inspect.Signature(takes), cls.Options)


class BankLoss(HeldState):
    """A loss of (query, key) with a memory bank, or within the batch.

    The bank is read before it is written, so a batch is never its own negative. Settings are
    attributes that may change at any time, such as a scheduled `temperature`; what shapes the bank
    is fixed. `memory_bank_size=0` (lightly's word) is the in-batch form, where both views carry
    gradient, `memory_bank` is None and nothing is enqueued.
    """

    # A method names these. `function(query, key, bank: BankView | None, *, ids, options)`.
    Options: type[LossOptions] = LossOptions
    function: Callable[..., Any]
    memory_bank_size: tuple[int, int] | int = 0  # the default
    _has_in_batch_form = True
    _can_shard = True
    _samples = False  # `function` takes rng_state and row_offset as well
    _learns_from_labels = False  # and labels

    _fixed = (
        *("memory_bank_size", "bank_dtype", "indexed_bank"),
        *("gather_distributed", "shard_bank", "process_group"),
    )

    __signature__ = _Signature()

    def __init__(
        self,
        temperature: float = _OWN,
        memory_bank_size: tuple[int, int] | int = _OWN,
        *,
        bank_dtype: torch.dtype = torch.float32,
        indexed_bank: bool = False,
        gather_distributed: bool = False,
        shard_bank: bool = False,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        backend: str = "auto",
        **settings,
    ):
        super().__init__()
        if temperature is not _OWN:
            settings["temperature"] = temperature
        if memory_bank_size is _OWN:
            memory_bank_size = self.memory_bank_size
        self.process_group, self.collective = process_group, gather_distributed or shard_bank
        if self.collective:
            rank_and_world(process_group)  # refuses a group that this rank is not in
        kind = {"dtype": bank_dtype, "indexed": indexed_bank}
        self.memory_bank = self._make_bank(memory_bank_size, shard_bank, kind)
        self.options = self.Options(**settings)
        self.seed, self.backend = seed, backend
        for name in ("options", "seed", "backend"):
            self._check(name, getattr(self, name))
        self._calls = 0  # that took noise since the state was set: equal on all ranks
        self.hold("rng_state", torch.tensor([seed, 0]))
        self._register_load_state_dict_pre_hook(self._before_load)

    # --- settings ---

    def _check(self, name: str, value: Any) -> None:
        """Raise the ValueError of a wrong value of what may change."""
        if name == "seed":
            checks.check_int("seed", value, -(2**63), 2**63 - 1)
        elif name == "backend":
            registry.require(value)
        elif not isinstance(value, self.Options):
            raise ValueError(f"options: got {value!r}, wanted {self.Options.__name__}")
        elif self.memory_bank is not None:
            value.check_size(self.memory_bank.size)

    @property
    def settings(self) -> dict[str, Any]:
        """By name, the method's own."""
        shared = {f.name for f in fields(ContrastiveOptions)}
        return {n: value for n, value in vars(self.options).items() if n not in shared}

    def __getattr__(self, name: str) -> Any:
        if name != "options" and name in self.Options.__dataclass_fields__:
            return getattr(self.options, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "rng_state" not in self.__dict__:  # not made yet
            return super().__setattr__(name, value)
        if name in self._fixed:
            raise ValueError(f"{name}: got {value!r} for a loss that exists, wanted a new loss")
        if name in self.Options.__dataclass_fields__:
            name, value = "options", replace(self.options, **{name: value})
        if name in ("options", "seed", "backend"):
            self._check(name, value)
        super().__setattr__(name, value)
        if name == "seed":
            self.reset_noise()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())

    # --- state ---

    def _make_bank(
        self, memory_bank_size: tuple[int, int] | int, shard_bank: bool, kind: dict[str, Any]
    ) -> MemoryBank | None:
        none = not isinstance(memory_bank_size, Sequence) and memory_bank_size == 0
        if none and self._has_in_batch_form:
            if self.collective or kind["indexed"]:
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
        if shard_bank and not self._can_shard:
            raise ValueError(f"shard_bank: got True, which {type(self).__name__} does not have")
        if shard_bank:
            return ShardedBank(size, dim, process_group=self.process_group, **kind)
        return MemoryBank(size, dim, **kind)

    @torch.no_grad()
    def reset_noise(self) -> None:
        """The noise of a new loss: state [seed, 0]."""
        self._calls = 0
        self.rng_state.copy_(torch.tensor([self.seed, 0]))

    def restore(self, name: str, loaded: Tensor) -> None:
        super().restore(name, loaded)
        self._calls = 0

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
        if self.collective:  # else the bank checks them itself
            self._check_write(key, labels, ids)
        self._write(key, labels, ids)

    def _check_write(self, key: Tensor, labels: Tensor | None, ids: Tensor | None) -> None:
        """Raise the ValueError that an enqueue would raise: on all ranks, where they gather."""
        if self.collective:
            agree(self.process_group, lambda: self._input(key, labels, ids))
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
            ids: (B,) int64 names of the samples, kept with the keys in the bank: a row does not see
                the slots that hold its own id. Negative: unknown.
            update: whether to enqueue; None: when training and grad mode is on.

        Returns:
            The loss, fp32: 0-d, or (B,) for reduction="none".
        """
        more = {"labels": labels} if self._learns_from_labels else {}
        return self._step(query, key, labels, ids, update, more)

    def _step(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor | None,
        ids: Tensor | None,
        update: bool | None,
        more: dict[str, Any],
    ) -> Any:
        """What `function` gives with `more` arguments; then the noise and the bank move on."""
        memory = self.memory_bank  # once: a Module looks its parts up slowly
        if memory is not None or self._samples:  # what moves on cannot be run again
            refuse_recompute(self.rng_state)
        if update and memory is None:
            raise ValueError("update: got True, wanted None or False: memory_bank_size is 0")
        learns = self._learns()
        update = learns and memory is not None if update is None else update
        bank, rank = None, 0
        if memory is not None:
            bank = memory.view(ids=ids is not None, backend=self.backend)
            if self.collective:
                rank = self._agree(query, key, labels, ids, update, bank, more)
            elif labels is not None or ids is not None or memory.indexed:
                memory.check(key, labels, ids, write=update)  # `function` checks query and key
        if self._samples:
            more |= {"rng_state": self.rng_state, "row_offset": rank and rank * len(key)}
        result = self.function(query, key, bank, ids=ids, options=self.options, **more)
        # An evaluation leaves the noise as it is, so that it neither changes nor depends on a run.
        if update:
            self._write(key, labels, ids, self.rng_state)
        elif learns:
            self.rng_state[1:].add_(1)
        if self.collective and (update or learns):
            self._calls += 1
        return result

    def _agree(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor | None,
        ids: Tensor | None,
        update: bool,
        bank: BankView,
        more: dict[str, Any],
    ) -> int:
        """Check, together with the other ranks where they will exchange rows; this rank."""

        def say() -> dict[str, object]:
            check_pair(query, key, bank, more.get("projection"))
            bank.check()
            mine = {"query dtype": str(query.dtype), "update": update, "seed": self.seed}
            mine |= {"calls so far": self._calls}  # a rank that trained alone has other noise
            flags = {name: value for name, value in more.items() if isinstance(value, bool)}
            return self._input(key, labels, ids, update) | mine | flags

        if update or isinstance(self.memory_bank, ShardedBank):
            agree(self.process_group, say)
        else:
            say()
        return self._rank_and_world()[0]

    def _rank_and_world(self) -> tuple[int, int]:
        return rank_and_world(self.process_group) if self.collective else (0, 1)

    def _input(
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

    def _write(
        self,
        key: Tensor,
        labels: Tensor | None,
        ids: Tensor | None,
        rng_state: Tensor | None = None,
    ) -> None:
        if self.collective:
            rows = (key, labels, ids)
            rows = [None if x is None else gather(x, self.process_group) for x in rows]
            key, labels, ids = rows
        kwargs = {"ids": ids, "backend": self.backend, "rng_state": rng_state}
        self.memory_bank.enqueue(key, labels, **kwargs)


def alternate(pair: Sequence[Tensor]) -> Tensor:
    """(B, ...) twice -> (2B, ...), row by row: a sample's place, hence its noise, is that of one
    process however many there are."""
    return torch.stack(tuple(pair), 1).flatten(0, 1)
