"""Contrastive losses with memory banks, never a B x K matrix."""

from psm_kernels.bank import MemoryBank
from psm_kernels.losses import (
    CLIPLoss,
    HCLLoss,
    InfoNCELoss,
    MSFLoss,
    NNCLRLoss,
    PSMLoss,
    ReSSLLoss,
    SSCLLoss,
    SupConLoss,
    UnReMixLoss,
)
from psm_kernels.losses.stats import MiningStats, PSMOutput, rank_gradient_stats
from psm_kernels.mine import mine_negatives

__version__ = "0.1.0"
__all__ = [
    "CLIPLoss",
    "HCLLoss",
    "InfoNCELoss",
    "MSFLoss",
    "MemoryBank",
    "MiningStats",
    "NNCLRLoss",
    "PSMLoss",
    "PSMOutput",
    "ReSSLLoss",
    "SSCLLoss",
    "SupConLoss",
    "UnReMixLoss",
    "mine_negatives",
    "rank_gradient_stats",
]
