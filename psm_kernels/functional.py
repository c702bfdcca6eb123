"""Losses without state: one or two passes over the bank, then B numbers in plain torch."""

from psm_kernels.losses.hcl import hcl_loss
from psm_kernels.losses.info_nce import info_nce_loss
from psm_kernels.losses.psm import psm_loss
from psm_kernels.losses.sscl import sscl_loss
from psm_kernels.losses.unremix import unremix_loss

__all__ = ["hcl_loss", "info_nce_loss", "psm_loss", "sscl_loss", "unremix_loss"]
