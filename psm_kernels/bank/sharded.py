"""A bank over many processes: each rank holds ceil(K / world) slots, passes once over them for the
rows of all ranks, and sends each rank the partial results of its rows. The noise is keyed by global
row and slot: nothing depends on the world size but the rounding of sums."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from psm_kernels import checks, ops
from psm_kernels._autograd import with_gradient
from psm_kernels.backends.base import NOTHING, BankPass, Exclude
from psm_kernels.bank.collectives import gather_all, merge, merge_topk, rank_and_world, scatter
from psm_kernels.bank.memory_bank import MemoryBank
from psm_kernels.bank.view import BankView, hidden, label_sums
from psm_kernels.options import PassOptions


class Shard:
    """One rank's slots, standing in for the whole (K, ...) tensor.

    What reads it is collective: every rank of the group must do the same with equal shapes.
    """

    def __init__(self, rows: Tensor, size: int, group: dist.ProcessGroup | None):
        self.rows = rows  # (ceil(K / R) + 1, ...): this rank's slots and a scrap row
        self.group, self.per_rank = group, rows.shape[0] - 1
        self.rank, self.world = rank_and_world(group)
        self.start = self.rank * self.per_rank
        self.shape = torch.Size((size, *rows.shape[1:]))
        self.dtype, self.device = rows.dtype, rows.device

    def __len__(self) -> int:
        return self.shape[0]

    def valid(self, count: Tensor) -> Tensor:
        """How many of this rank's slots are among the first `count` of all."""
        return (count - self.start).clamp(0, self.per_rank)

    @torch.no_grad()
    def __getitem__(self, slots: Tensor) -> Tensor:
        """Rows of the given global slots (...,), each rank's own choice of them."""
        if slots.numel() == 0:  # topk = 0
            return self.rows.new_empty(*slots.shape, *self.shape[1:])
        wanted = gather_all((slots.reshape(-1, 1),), self.group)[0][:, 0]  # (R n,)
        found = self.rows[(wanted - self.start).clamp(0, self.per_rank)]  # (R n, ...)
        (found,) = scatter((found,), self.group)  # (R, n, ...)
        owner = slots.flatten() // self.per_rank
        found = found[owner, torch.arange(len(owner), device=owner.device)]
        return found.view(*slots.shape, *self.shape[1:])


class ShardView(BankView):
    """`BankView` of a sharded bank: `bank`, `ids` and `labels` are Shards, calls are collective."""

    bank: Shard

    def check(self) -> None:
        checks.check_bank(self.bank.rows)
        ops.check_backend(self.backend, self.bank)

    def _local_ids(self) -> Tensor:
        return self.ids.rows

    def scan(
        self, query: Tensor, key: Tensor | None, s_pos: Tensor, options: PassOptions,
        exclude: Exclude = NOTHING, rng_state: Tensor | None = None,
    ) -> BankPass:  # fmt: skip
        """Of this rank's rows against all ranks' slots. Three numbers, D and 2k columns per row go
        to each rank, whatever K is. With `exclude_mined` the ranks first agree on what is mined: no
        rank can tell that from its own slots."""
        bank, mined = self.bank, None
        with torch.no_grad():
            if options.exclude_mined and options.topk:
                mined = self.topk(key, options.topk, exclude)
                exclude = exclude.naming(mined[1])
                options = replace(options, topk=0)
            mine = (query.to(bank.dtype), s_pos)
            mine += (key.to(bank.dtype),) if options.topk else ()
            (all_query, all_s_pos, *all_key), local = self._everyones(mine, exclude)
            row_offset = options.row_offset - bank.rank * len(query)
            part = ops.run_pass(
                all_query,
                all_key[0] if all_key else None,
                bank.rows,
                bank.valid(self.count),
                all_s_pos,
                replace(options, row_offset=row_offset, col_offset=bank.start),
                local,
                rng_state,
                self.backend,
            )
            part = part._replace(topk_index=self._global_slots(part.topk_index))
            result = merge(BankPass(*scatter(part, bank.group)))
            if mined is not None:
                result = result._replace(topk_sim=mined[0], topk_index=mined[1])
        lse = with_gradient(result.neg_lse, result.neg_mean, query, options.temperature)
        return result._replace(neg_lse=lse)

    @torch.no_grad()
    def topk(self, query: Tensor, k: int, exclude: Exclude = NOTHING) -> tuple[Tensor, Tensor]:
        bank = self.bank
        (query,), local = self._everyones((query.detach().to(bank.dtype),), exclude)
        count = bank.valid(self.count)
        similarity, index = ops.run_topk(query, bank.rows, k, count, local, self.backend)
        return merge_topk(*scatter((similarity, self._global_slots(index)), bank.group))

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """They come from the ranks that hold them."""
        rows = self.bank[index.clamp_min(0)].to(dtype)
        return torch.where((index >= 0)[..., None], rows, 0.0)

    def psm_step(self, *unused) -> None:
        return None

    @torch.no_grad()
    def hidden(self, exclude: Exclude) -> tuple[Tensor, Tensor]:
        bank = self.bank
        (ids,) = gather_all((exclude.ids,), bank.group)
        copies, empty = hidden(Exclude(None, ids, exclude.bank_ids), bank.valid(self.count))
        copies, empty = scatter((copies, empty.expand_as(copies).contiguous()), bank.group)
        return copies.sum(0), empty[:, 0].sum()  # of (R, B)

    @torch.no_grad()
    def label_sums(self, labels: Tensor, exclude: Exclude = NOTHING) -> tuple[Tensor, Tensor]:
        bank = self.bank
        (labels,), local = self._everyones((labels,), exclude)
        args = (bank.rows, self.labels.rows, bank.valid(self.count), labels, local)
        total, number = scatter(label_sums(*args), bank.group)
        return total.sum(0).to(self.sums), number.sum(0)

    def row_ranges(self, *unused, **more):
        raise ValueError("shard_bank: got a sharded bank, which UnReMix does not have")

    def _everyones(
        self, rows: tuple[Tensor, ...], exclude: Exclude
    ) -> tuple[list[Tensor], Exclude]:
        """The rows of all ranks, and what they exclude of this rank's slots."""
        named = tuple(value for value in (exclude.slots, exclude.ids) if value is not None)
        gathered = gather_all(rows + named, self.bank.group)
        rows, named = gathered[: len(rows)], gathered[len(rows) :]
        slots = None if exclude.slots is None else named.pop(0) - self.bank.start
        ids = None if exclude.ids is None else named.pop(0)  # slots of others are outside
        return rows, Exclude(slots, ids, exclude.bank_ids)

    def _global_slots(self, index: Tensor) -> Tensor:
        return torch.where(index >= 0, index + self.bank.start, -1)


class ShardedBank(MemoryBank):
    """A memory bank of which each rank holds ceil(K / world) consecutive slots.

    The split is `torch.chunk`'s, so state_dict hands out DTensors (K, D) that share memory with
    the shard: torch.distributed.checkpoint saves them and loads them with any world size, also
    into a replicated bank. Loading takes such DTensors or whole (K, D) tensors.

    Its rows are no buffers: DDP and FSDP would overwrite every shard with rank 0's.

    Args:
        size, dim, dtype, device, indexed, momentum: as in `MemoryBank`; size is the K of all ranks
            together.
        process_group: None is the default group.

    Raises:
        ValueError: torch.distributed is not initialized, or this rank is not in the group.
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
        process_group: dist.ProcessGroup | None = None,
    ):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "shard_bank: got True without a process group; run under torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self._size, self.process_group = size, process_group
        options = {"dtype": dtype, "device": device, "indexed": indexed, "momentum": momentum}
        super().__init__(size, dim, **options)

    def _allocate(self, size: int, dim: int, dtype: torch.dtype, device) -> None:
        _, world = rank_and_world(self.process_group)
        # One scrap row takes the writes that belong to other ranks: no dynamic shape, no sync.
        slots = -(-size // world) + 1
        for name, attribute, shape, kind in (
            ("bank", "_rows", (slots, dim), dtype),
            ("labels", "_row_labels", (slots,), torch.int64),
            ("ids", "_row_ids", (slots,), torch.int64),
        ):
            own = torch.empty(shape, dtype=kind, device=device)
            self.hold(name, own, attribute=attribute)

    def _view(self, *args) -> ShardView:
        return ShardView(*args)

    def _stored(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._rows, self._row_labels, self._row_ids

    @property
    def bank(self) -> Shard:
        """Stands for the whole bank; reading it is collective."""
        return Shard(self._rows, self._size, self.process_group)

    @property
    def labels(self) -> Shard:
        return Shard(self._row_labels, self._size, self.process_group)

    @property
    def ids(self) -> Shard:
        return Shard(self._row_ids, self._size, self.process_group)

    @property
    def size(self) -> int:
        return self._size

    @property
    def dim(self) -> int:
        return self._rows.shape[1]

    def _write(self, slots: Tensor, rows: Tensor, labels: Tensor, ids: Tensor) -> None:
        """The keys of all ranks come in; this rank keeps those of its slots."""
        shard = self.bank
        local = slots - shard.start
        mine = (local >= 0) & (local < shard.per_rank)
        super()._write(torch.where(mine, local, shard.per_rank), rows, labels, ids)

    def saved(self, name: str) -> Tensor:
        value = super().saved(name)
        return self._dtensor(value) if value.ndim else value

    def restore(self, name: str, loaded: Tensor) -> None:
        value = super().saved(name)
        if value.ndim == 0:
            return super().restore(name, loaded)
        own = self._owned(value)
        is_shard = hasattr(loaded, "to_local")  # a DTensor: no import for the question
        own.copy_(loaded.to_local() if is_shard else loaded[self.bank.start :][: len(own)])

    def _owned(self, rows: Tensor) -> Tensor:
        """A view without the scrap row, and on the last ranks without slots beyond K."""
        return rows[: max(0, min(len(rows) - 1, self._size - self.bank.start))]

    def _dtensor(self, rows: Tensor) -> Tensor:
        # Imported late: it takes seconds and only checkpoints need it.
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Split

        group = self.process_group or dist.group.WORLD
        mesh = DeviceMesh.from_group(group, rows.device.type)
        shape = torch.Size((self._size, *rows.shape[1:]))
        own = self._owned(rows)
        return DTensor.from_local(
            own, mesh, [Split(0)], run_check=False, shape=shape, stride=rows.stride()
        )
