"""PSM's kin as modules: losses of (query, key) with a memory bank or within the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from psm_kernels import functional
from psm_kernels._autograd import refuse_recompute
from psm_kernels.distributed import ShardedBank
from psm_kernels.losses.psm import BankLoss
from psm_kernels.memory_bank import MemoryBank

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11


class SharedOptions(TypedDict, total=False):
    """What every loss takes by keyword, as in `PSMLoss`."""

    reduction: str
    bank_dtype: torch.dtype
    gather_distributed: bool
    shard_bank: bool
    process_group: dist.ProcessGroup | None
    seed: int
    backend: str


class PairLoss(BankLoss):
    """What the kin share: `memory_bank_size=0` (lightly's word) is the in-batch form, where both
    views carry gradient, `memory_bank` is None and nothing is enqueued."""

    _twin: Any  # the function in `psm_kernels.functional`
    _check_settings: Any  # raises the ValueError of a wrong setting

    def __init__(
        self,
        temperature: float,
        memory_bank_size: tuple[int, int] | int,
        settings: dict[str, Any],
        **shared: Unpack[SharedOptions],
    ):
        super().__init__(temperature, memory_bank_size, **shared)
        if self.memory_bank is None and self.collective:
            raise ValueError(
                "memory_bank_size: got 0 with gather_distributed or shard_bank, wanted (rows, "
                "columns): negatives within the batch are this rank's own"
            )
        self.settings = settings
        self._check_settings(
            temperature=temperature, reduction=self.reduction, bank=self.memory_bank, **settings
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        labels: Tensor | None = None,
        update: bool | None = None,
    ) -> Tensor:
        """Loss of query (B, D) against key (B, D) and the negatives; then the keys are enqueued.

        Args:
            query: carries gradient; key: from the momentum encoder, or the other view in-batch.
            labels: (B,) int64, kept with the keys in the bank.
            update: whether to enqueue; None: when training and grad mode is on.

        Returns:
            The loss, fp32: 0-d, or (B,) for reduction="none".
        """
        bank, row_offset = self.memory_bank, 0
        if bank is not None:
            update, row_offset = self._start(query, key, labels, update)
        elif self._noise(row_offset):
            refuse_recompute(self.rng_state)
        if bank is None and update:
            raise ValueError("update: got True, wanted None or False: memory_bank_size is 0")
        loss = self._twin(
            query,
            key,
            None if bank is None else bank.bank,
            count=None if bank is None else bank.count,
            temperature=self.temperature,
            reduction=self.reduction,
            backend=self.backend,
            **self.settings,
            **self._noise(row_offset),
        )
        self._finish(key, labels, bank is not None and update)
        return loss

    def enqueue(self, key: Tensor, labels: Tensor | None = None) -> None:
        if self.memory_bank is None:
            raise ValueError("memory_bank_size: got 0, wanted (rows, columns), for a bank to write")
        super().enqueue(key, labels)

    def _noise(self, row_offset: int) -> dict[str, Any]:
        """Arguments of the twin that draws noise."""
        return {}

    def _make_bank(self, memory_bank_size, *options) -> MemoryBank | None:
        return None if memory_bank_size == 0 else super()._make_bank(memory_bank_size, *options)

    def _before_load(self, state_dict, prefix, *unused) -> None:
        if self.memory_bank is not None:
            super()._before_load(state_dict, prefix, *unused)

    def extra_repr(self) -> str:
        chosen = (f"{name}={value!r}" for name, value in self.settings.items())
        return ", ".join((super().extra_repr(), *chosen))


class InfoNCELoss(PairLoss):
    """InfoNCE: MoCo with a bank (arXiv 1911.05722), NT-Xent of SimCLR without (arXiv 2002.05709).

    Formula: `psm_kernels.functional.info_nce_loss`.

    Args:
        temperature: tau > 0 (0.2: MoCo v2).
        memory_bank_size: (rows K, columns D), or 0 for the in-batch form ((65536, 128): MoCo).
        reduction, bank_dtype, gather_distributed, shard_bank, process_group, seed, backend: as in
            `PSMLoss`, with its defaults; gathering and sharding need a bank.

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

    def _check_settings(self, **unused) -> None:
        """None of its own."""


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

    def _check_settings(self, bank, **settings) -> None:
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

    def _check_settings(self, bank, num_hard, num_synthetic, mix, **settings) -> None:
        functional.check_hcl_settings(**settings)
        functional.check_sscl_settings(
            num_hard=num_hard,
            num_synthetic=num_synthetic,
            mix=mix,
            size=None if bank is None else bank.size,
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

    def _check_settings(self, bank, **settings) -> None:
        if isinstance(bank, ShardedBank):
            raise ValueError("shard_bank: got True, which UnReMixLoss does not have")
        functional.check_unremix_settings(**settings)
