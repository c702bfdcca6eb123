"""The losses: one method, one file, function and module side by side."""

from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.clip import CLIPLoss
from psm_kernels.losses.hcl import HCLLoss
from psm_kernels.losses.info_nce import InfoNCELoss
from psm_kernels.losses.msf import MSFLoss
from psm_kernels.losses.nnclr import NNCLRLoss
from psm_kernels.losses.psm import PSMLoss
from psm_kernels.losses.ressl import ReSSLLoss
from psm_kernels.losses.sscl import SSCLLoss
from psm_kernels.losses.supcon import SupConLoss
from psm_kernels.losses.unremix import UnReMixLoss

__all__ = [
    "BankLoss",
    "CLIPLoss",
    "HCLLoss",
    "InfoNCELoss",
    "MSFLoss",
    "NNCLRLoss",
    "PSMLoss",
    "ReSSLLoss",
    "SSCLLoss",
    "SupConLoss",
    "UnReMixLoss",
]
