"""Banks of past keys, and what a loss asks of them."""

from __future__ import annotations

from torch import Tensor

from psm_kernels.bank.memory_bank import MemoryBank
from psm_kernels.bank.sharded import Shard, ShardedBank, ShardView
from psm_kernels.bank.view import BankView

__all__ = ["BankView", "MemoryBank", "Shard", "ShardView", "ShardedBank", "view_of"]


def view_of(bank: Tensor | Shard, *args) -> BankView:
    """`bank` with the further arguments of BankView, as a loss reads it."""
    return (ShardView if isinstance(bank, Shard) else BankView)(bank, *args)
