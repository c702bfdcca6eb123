"""PSM's kin as modules: losses of (query, key) with a memory bank or within the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psm_kernels import functional
from psm_kernels.distributed import ShardedBank
from psm_kernels.losses.base import PairLoss, SharedOptions

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11


class InfoNCELoss(PairLoss):
    """InfoNCE: MoCo with a bank (arXiv 1911.05722), NT-Xent of SimCLR without (arXiv 2002.05709).

    Formula: `psm_kernels.functional.info_nce_loss`.

    Args:
        temperature: tau > 0 (0.2: MoCo v2).
        memory_bank_size: (rows K, columns D), or 0 for the in-batch form ((65536, 128): MoCo).
        reduction, bank_dtype, indexed_bank, gather_distributed, shard_bank, process_group, seed,
            backend: as in `PSMLoss`, with its defaults; all that concerns the bank needs one.

    Raises:
        ValueError: an argument is wrong; bank and noise state are as before.
    """

    _twin = staticmethod(functional.info_nce_loss)

    def __init__(
        self,
        temperature: float = 0.2,
        memory_bank_size: tuple[int, int] | int = (65536, 128),
        **shared: Unpack[SharedOptions],
    ):
        super().__init__(temperature, memory_bank_size, {}, **shared)

    def _check_settings(self, *, temperature: float, reduction: str) -> None:
        functional.check_pair_settings(temperature=temperature, reduction=reduction)


class HCLLoss(PairLoss):
    """HCL: negatives reweighted by hardness and debiased (arXiv 2010.04592); beta = 0 is DCL.

    Formula: `psm_kernels.functional.hcl_loss`. Defaults: joshr17/HCL, image/main.py.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D), or 0 for the in-batch form, the paper's.
        beta, tau_plus, detach_weights: see there.
        All else: as in `InfoNCELoss`.

    Raises:
        ValueError: an argument is wrong; bank and noise state are as before.
    """

    _twin = staticmethod(functional.hcl_loss)

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: tuple[int, int] | int = 0,
        *,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        detach_weights: bool = False,
        **shared: Unpack[SharedOptions],
    ):
        super().__init__(
            temperature,
            memory_bank_size,
            {"beta": beta, "tau_plus": tau_plus, "detach_weights": detach_weights},
            **shared,
        )

    def _check_settings(self, **settings) -> None:
        functional.check_hcl_settings(**settings)


class SSCLLoss(PairLoss):
    """SSCL: HCL with synthetic negatives mixed from each anchor's hardest (arXiv 2304.02971).

    Formula: `psm_kernels.functional.sscl_loss`. Defaults: dhkdhk/SSCL, config.conf.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D), or 0 for the in-batch form, the paper's.
        num_hard, num_synthetic, beta, tau_plus, mix, detach_weights: see there.
        seed: of the canonical noise; the state [seed, offset] is the buffer `rng_state`.
        All else: as in `InfoNCELoss`.

    Raises:
        ValueError: an argument is wrong; bank and noise state are as before.
    """

    _twin = staticmethod(functional.sscl_loss)

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: tuple[int, int] | int = 0,
        *,
        num_hard: int = 32,
        num_synthetic: int = 8,
        beta: float = 1.0,
        tau_plus: float = 0.05,
        mix: str = "pair",
        detach_weights: bool = False,
        **shared: Unpack[SharedOptions],
    ):
        super().__init__(
            temperature,
            memory_bank_size,
            {
                "num_hard": num_hard,
                "num_synthetic": num_synthetic,
                "beta": beta,
                "tau_plus": tau_plus,
                "mix": mix,
                "detach_weights": detach_weights,
            },
            **shared,
        )

    def _check_settings(self, num_hard, num_synthetic, mix, **settings) -> None:
        functional.check_hcl_settings(**settings)
        functional.check_sscl_settings(
            num_hard=num_hard,
            num_synthetic=num_synthetic,
            mix=mix,
            size=None if self.memory_bank is None else self.memory_bank.size,
        )

    def _noise(self, row_offset: int) -> dict[str, Any]:
        return {"rng_state": self.rng_state, "row_offset": row_offset}


class UnReMixLoss(PairLoss):
    """UnReMix: negatives weighed by three indicators of importance (after arXiv 2206.01197).

    The structure is the paper's; every formula and coefficient is inferred, because neither its
    body nor its code could be read: see `psm_kernels.functional.unremix_loss`.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D), or 0 for the in-batch form, the paper's.
        similarity_weight, uncertainty_weight, representativeness_weight: see there.
        All else: as in `InfoNCELoss`.

    Raises:
        ValueError: an argument is wrong; bank and noise state are as before.
    """

    _twin = staticmethod(functional.unremix_loss)

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: tuple[int, int] | int = 0,
        *,
        similarity_weight: float = 1 / 3,
        uncertainty_weight: float = 1 / 3,
        representativeness_weight: float = 1 / 3,
        **shared: Unpack[SharedOptions],
    ):
        super().__init__(
            temperature,
            memory_bank_size,
            {
                "similarity_weight": similarity_weight,
                "uncertainty_weight": uncertainty_weight,
                "representativeness_weight": representativeness_weight,
            },
            **shared,
        )

    def _check_settings(self, **settings) -> None:
        if isinstance(self.memory_bank, ShardedBank):
            raise ValueError("shard_bank: got True, which UnReMixLoss does not have")
        functional.check_unremix_settings(**settings)
