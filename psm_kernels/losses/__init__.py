"""The losses: one method, one file, function and module side by side."""

from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.hcl import HCLLoss
from psm_kernels.losses.info_nce import InfoNCELoss
from psm_kernels.losses.psm import PSMLoss
from psm_kernels.losses.sscl import SSCLLoss
from psm_kernels.losses.unremix import UnReMixLoss

__all__ = ["BankLoss", "HCLLoss", "InfoNCELoss", "PSMLoss", "SSCLLoss", "UnReMixLoss"]
