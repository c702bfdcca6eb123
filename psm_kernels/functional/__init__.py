"""Losses without state: one or two passes over the bank, a finish in plain torch."""

from psm_kernels.functional.common import REDUCTIONS, check_pair, check_pair_settings
from psm_kernels.functional.hcl import check_hcl_settings, check_sscl_settings, hcl_loss, sscl_loss
from psm_kernels.functional.info_nce import info_nce_loss
from psm_kernels.functional.psm import check_psm_settings, psm_loss
from psm_kernels.functional.unremix import check_unremix_settings, unremix_loss

__all__ = [
    "REDUCTIONS",
    "check_hcl_settings",
    "check_pair",
    "check_pair_settings",
    "check_psm_settings",
    "check_sscl_settings",
    "check_unremix_settings",
    "hcl_loss",
    "info_nce_loss",
    "psm_loss",
    "sscl_loss",
    "unremix_loss",
]
