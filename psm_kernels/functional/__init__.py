"""Losses without state: one pass over the bank, a finish in plain torch."""

from psm_kernels.functional.common import REDUCTIONS, check_pair
from psm_kernels.functional.psm import check_psm_settings, psm_loss

__all__ = ["REDUCTIONS", "check_pair", "check_psm_settings", "psm_loss"]
