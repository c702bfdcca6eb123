"""Moving rows between processes, and agreeing before anything moves: a collective with unequal
sizes hangs or worse."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from psm_kernels.backends.base import BankPass

_SAID_BYTES = 2048  # what a rank says of its input before rows move


def rank_and_world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """This process's rank in `group` (None: the default group) and the group's size; (0, 1) where
    torch.distributed is not initialized.

    Raises:
        ValueError: the process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError("process_group: got a group, but torch.distributed is not initialized")
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            f"process_group: global rank {dist.get_rank()} is not in it; build the loss on the "
            "group's own ranks only"
        )
    return rank, dist.get_world_size(group)


def gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows of every rank in rank order, (R B, ...) from (B, ...); detached. All ranks bring the
    same B: `agree` first."""
    return gather_all((x.detach(),), group)[0]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        return sum(scatter((grad.contiguous(),), ctx.group)[0].unbind()), None


def gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """`gather` with a gradient: what all ranks' losses give this rank's rows, in rank order."""
    return _GatherRows.apply(x, group)


@torch.no_grad()
def average(*tensors: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Put the mean over all ranks into each floating tensor, such as running statistics."""
    _, world = rank_and_world(group)
    if world > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)
            tensor /= world


def agree(group: dist.ProcessGroup | None, say: Callable[[], dict[str, object]]) -> None:
    """Raise a ValueError on every rank if `say()` raises one anywhere or differs between ranks.

    One small all-gather between CPUs (0.3 ms with two gloo processes), never a device
    synchronization. A rank that died meanwhile is a RuntimeError here rather than a hang.

    Args:
        group: the process group, None for the default one.
        say: checks this rank's input and says what must be equal everywhere; JSON values.
    """
    rank, world = rank_and_world(group)
    if world == 1:
        say()
        return
    problem = None
    try:
        mine = say()
    except ValueError as error:
        problem, mine = error, {"refused": str(error)}
    said = _exchange(mine, group, world)
    if problem is not None:
        raise problem
    if all(other == said[rank] for other in said):
        return
    for other, there in enumerate(said):
        if "refused" in there:
            raise ValueError(f"rank {other} of {world} refused its input: {there['refused']}")
    for name in mine:
        values = [there.get(name) for there in said]
        if any(value != values[0] for value in values):
            fix = "; pass drop_last=True to the DataLoader" if name == "batch size" else ""
            raise ValueError(
                f"{name}: got {values} on ranks 0 to {world - 1}, wanted the same on all{fix}"
            )


def merge(parts: BankPass) -> BankPass:
    """Results over disjoint slots, stacked in slot order (R, B, ...), as one over their union."""
    lse = torch.logsumexp(parts.neg_lse, 0)  # (B,)
    share = torch.exp(parts.neg_lse - torch.where(lse == -torch.inf, 0.0, lse))  # (R, B)
    return BankPass(
        lse,
        (share[..., None] * parts.neg_mean).sum(0),
        torch.logsumexp(parts.neg_sq_lse, 0),
        parts.neg_count.sum(0),
        *merge_topk(parts.topk_sim, parts.topk_index),
    )


def merge_topk(similarity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(R, B, k) twice -> (B, k) twice. Stable, and slots ascend: ties go to the smaller one."""
    k = index.shape[2]
    similarity, index = (t.transpose(0, 1).flatten(1) for t in (similarity, index))  # (B, R k)
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return similarity[:, :k], index.gather(1, order[:, :k])


# --- moving rows ---------------------------------------------------------------------------------


def _pack(tensors: tuple[Tensor, ...]) -> Tensor:
    """Tensors of B rows and any dtypes as one (B, bytes): one collective instead of many."""
    flat = [t.reshape(len(t), t[:1].numel()).contiguous().view(torch.uint8) for t in tensors]
    return torch.cat(flat, 1)


def _unpack(packed: Tensor, like: tuple[Tensor, ...]) -> list[Tensor]:
    """Undo `_pack`; `packed` (..., bytes) may have other leading sizes than `like` had."""
    widths = [t[:1].numel() * t.element_size() for t in like]
    pieces = packed.split(widths, -1)
    lead = packed.shape[:-1]
    return [
        p.clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(t.dtype)
        .view(*lead, *t.shape[1:])
        for p, t in zip(pieces, like, strict=True)
    ]


def gather_all(tensors: tuple[Tensor, ...], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Each (B, ...) -> (R B, ...), rank order."""
    _, world = rank_and_world(group)
    if world == 1:
        return list(tensors)
    packed = _pack(tensors)
    everyone = packed.new_empty(world * packed.shape[0], packed.shape[1])
    dist.all_gather_into_tensor(everyone, packed, group)
    return _unpack(everyone, tensors)


def scatter(tensors: tuple[Tensor, ...], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Each (R B, ...), rows of all ranks -> (R, B, ...), every rank's result for this rank's rows.

    An all-to-all and a sum here, not a reduce-scatter: its order, hence its bits, are the
    library's choice, and log-sums would need a maximum first.
    """
    _, world = rank_and_world(group)
    packed = _pack(tensors)
    received = packed
    if world > 1:
        received = torch.empty_like(packed)
        dist.all_to_all_single(received, packed, group=group)
    return _unpack(received.unflatten(0, (world, len(packed) // world)), tensors)


# Process groups that cannot move CPU tensors (plain NCCL) get a gloo group beside them.
_beside: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _cpu_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = group or dist.group.WORLD
    if "cpu:" in dist.get_backend_config(group):
        return group
    if group not in _beside:
        ranks = dist.get_process_group_ranks(group)
        _beside[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _beside[group]


def _exchange(mine: dict, group: dist.ProcessGroup | None, world: int) -> list[dict]:
    if "refused" in mine:
        mine = {"refused": mine["refused"][: _SAID_BYTES // 8]}  # JSON may take 6 bytes a letter
    text = json.dumps(mine).encode().ljust(_SAID_BYTES)
    if len(text) > _SAID_BYTES:
        raise ValueError(f"say: got {len(text)} bytes of JSON, wanted {_SAID_BYTES} at most")
    sent = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    received = torch.empty(world * _SAID_BYTES, dtype=torch.uint8)
    try:
        dist.all_gather_into_tensor(received, sent, _cpu_group(group))
    except RuntimeError as error:
        raise RuntimeError("no answer from the other ranks; did one of them end?") from error
    text = received.numpy().tobytes()
    return [json.loads(text[i : i + _SAID_BYTES]) for i in range(0, len(text), _SAID_BYTES)]
