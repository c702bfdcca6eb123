"""Banks over many processes, by the names of version 0.1: they live in `psm_kernels.bank`."""

from torch import nn

from psm_kernels.bank.collectives import agree, average, gather, merge, rank_and_world
from psm_kernels.bank.sharded import Shard, ShardedBank

__all__ = [
    "Shard",
    "ShardedBank",
    "agree",
    "average",
    "gather",
    "ignore_banks_in_ddp",
    "merge",
    "rank_and_world",
]


def ignore_banks_in_ddp(model: nn.Module) -> nn.Module:
    """Nothing is left to do before wrapping a model in DistributedDataParallel: it broadcasts rank
    0's buffers in each forward, and banks are no buffers. For scripts that call it."""
    return model
