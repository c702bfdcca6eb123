"""Losses without state: one or two passes over the bank, then B numbers in plain torch."""

from psm_kernels.losses.clip import clip_loss
from psm_kernels.losses.hcl import hcl_loss
from psm_kernels.losses.info_nce import info_nce_loss
from psm_kernels.losses.msf import msf_loss
from psm_kernels.losses.nnclr import nnclr_loss
from psm_kernels.losses.psm import psm_loss
from psm_kernels.losses.ressl import ressl_loss
from psm_kernels.losses.sampled_softmax import sampled_softmax_loss
from psm_kernels.losses.sscl import sscl_loss
from psm_kernels.losses.supcon import supcon_loss
from psm_kernels.losses.unremix import unremix_loss

__all__ = [
    "clip_loss",
    "hcl_loss",
    "info_nce_loss",
    "msf_loss",
    "nnclr_loss",
    "psm_loss",
    "ressl_loss",
    "sampled_softmax_loss",
    "sscl_loss",
    "supcon_loss",
    "unremix_loss",
]
