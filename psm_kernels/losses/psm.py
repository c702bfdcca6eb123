"""PSM as a module."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from psm_kernels import functional
from psm_kernels.distributed import rank_and_world
from psm_kernels.losses.base import BankLoss, alternate
from psm_kernels.stats import MiningStats, PSMOutput


class PSMLoss(BankLoss):
    """PSM with its own memory bank (arXiv 2311.00358); not the stereo-matching loss of that name.

    Arguments of the mining and the formula: `psm_kernels.functional.psm_loss`. They are attributes
    that may change between calls, as a scheduled `criterion.temperature = 0.1`.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D).
        topk, a, b, selection, soft_weights, weight_temperature, hard_weight, negatives: see there.
        reduction: "mean" | "sum" | "none".
        bank_dtype: fp32, bf16 or fp16; bf16 halves the bank and its reading time. Sums are fp32.
        indexed_bank: slot i holds sample i and is rewritten when its key comes again: the bank of a
            whole data set, each image once. Every call that enqueues then needs `ids` in [0, K).
        gather_distributed: enqueue the keys of all ranks in rank order; every rank holds the same
            bank. Calls that enqueue need the same batch size everywhere (drop_last=True). DDP's
            mean of the gradients is that of the whole batch's mean loss: scale nothing.
        shard_bank: each rank holds 1/world of the slots and all search all of them, so that every
            call runs on all ranks. Loss and gradient are those of one process with the whole batch.
        process_group: of both, None for the default group. Without torch.distributed
            `gather_distributed` does nothing, `shard_bank` is refused.
        seed: of the canonical noise, the same on all ranks; its state [seed, offset] is
            `rng_state`. Two losses with one seed draw the same noise: give each its own. Setting
            it starts the noise again.
        backend: "auto" or a name of `python -m psm_kernels`.

    Example:
        >>> criterion = PSMLoss(0.2, (65536, 128))
        >>> loss = criterion(query, key)  # reads the bank, then enqueues the keys

    Raises:
        ValueError: an argument is wrong; bank and noise state are as before.
    """

    _has_in_batch_form = False  # it mines its positives from a bank

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: tuple[int, int] = (16384, 128),
        *,
        topk: int = 5,
        a: float = 0.5,
        b: float = 0.0,
        selection: str = "bernoulli",
        soft_weights: str = "attention",
        weight_temperature: float = 1.0,
        hard_weight: float = 1.0,
        negatives: str = "bank",
        reduction: str = "mean",
        bank_dtype: torch.dtype = torch.float32,
        indexed_bank: bool = False,
        gather_distributed: bool = False,
        shard_bank: bool = False,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        backend: str = "auto",
    ):
        settings = {
            "topk": topk,
            "a": a,
            "b": b,
            "selection": selection,
            "soft_weights": soft_weights,
            "weight_temperature": weight_temperature,
            "hard_weight": hard_weight,
            "negatives": negatives,
        }
        super().__init__(
            temperature,
            memory_bank_size,
            settings,
            reduction=reduction,
            bank_dtype=bank_dtype,
            indexed_bank=indexed_bank,
            gather_distributed=gather_distributed,
            shard_bank=shard_bank,
            process_group=process_group,
            seed=seed,
            backend=backend,
        )

    def _check_settings(self, **settings) -> None:
        functional.check_psm_settings(size=self.memory_bank.size, **settings)

    def _rows_are_apart(self) -> bool:
        return self.negatives == "bank"

    def _joined(self, results: list[Tensor | PSMOutput]) -> Tensor | PSMOutput:
        if isinstance(results[0], Tensor):
            return super()._joined(results)
        both = [[getattr(r.stats, f.name) for r in results] for f in fields(MiningStats)]
        stats = [
            None if pair[0] is None else alternate(pair) if pair[0].ndim else sum(pair) / 2
            for pair in both
        ]
        return PSMOutput(super()._joined([r.loss for r in results]), MiningStats(*stats))

    def _noise(self, row_offset: int) -> dict:
        return {"rng_state": self.rng_state, "row_offset": row_offset}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        projection: Tensor | None = None,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        update: bool | None = None,
        return_stats: bool = False,
    ) -> Tensor | PSMOutput:
        """Loss of query (B, D) against key (B, D) and the bank; then the keys are enqueued.

        Args:
            query: carries gradient; key: from the momentum encoder.
            projection: (B, D) for the attention weights, default `query`.
            labels: (B,) int64, kept with the keys and used by statistics alone.
            ids: (B,) int64 names of the samples, kept with the keys: a slot that holds a row's own
                id is neither mined nor a negative of it. Negative: unknown.
            update: whether to enqueue; None: when training and grad mode is on.
            return_stats: return PSMOutput(loss, stats).

        Returns:
            The loss, fp32: 0-d, or (B,) for reduction="none".
        """
        bank = self.memory_bank
        update, state = self._start(
            query, key, labels, ids, update, projection, return_stats=return_stats
        )
        result = functional.psm_loss(
            query,
            key,
            projection=projection,
            labels=labels,
            bank_labels=bank.labels if return_stats else None,
            return_stats=return_stats,
            **self._call(),
            **state,
        )
        if return_stats:
            _, world = rank_and_world(self.process_group) if self.collective else (0, 1)
            written = bank.count.float()
            more = {"bank_fill": written / bank.size, "bank_age": written / (world * len(key))}
            result = result._replace(stats=replace(result.stats, **more))
        self._finish(key, labels, ids, update)
        return result
