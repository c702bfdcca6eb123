"""The losses as modules: check, call the functional twin, enqueue the keys."""

from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.pair import HCLLoss, InfoNCELoss, SSCLLoss, UnReMixLoss
from psm_kernels.losses.psm import PSMLoss

__all__ = ["BankLoss", "HCLLoss", "InfoNCELoss", "PSMLoss", "SSCLLoss", "UnReMixLoss"]
