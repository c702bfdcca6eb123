"""Losses without state: one pass over the bank, a finish in plain torch."""

from psm_kernels.functional.common import REDUCTIONS
from psm_kernels.functional.psm import check_psm_settings, psm_loss

__all__ = ["REDUCTIONS", "check_psm_settings", "psm_loss"]
