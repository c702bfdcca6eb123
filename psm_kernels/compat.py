"""The losses in the shape that other libraries' users call.

lightly: change the import, nothing else.

    from psm_kernels.compat import NTXentLoss        # was: from lightly.loss import NTXentLoss
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(4096, 128))
    loss = criterion(out0, out1)

`psm_kernels.PSMLoss` and its kin take the same call, with defaults of their own.

pytorch-metric-learning: the call of `CrossBatchMemory` with an `enqueue_mask` stays.

    loss_fn = CrossBatchPSM(128, 4096)           # was: CrossBatchMemory(NTXentLoss(), 128, 4096)
    loss = loss_fn(torch.cat((query, key)), labels, enqueue_mask=mask)

A MoCo script needs no adapter: one line replaces its block from the positive logits to the enqueue
and the CrossEntropyLoss behind it, and `load_state_dict` takes its `queue` and `queue_ptr`.

    self.criterion = InfoNCELoss(T, (K, dim))        # in __init__; PSMLoss(T, (K, dim)) for PSM
    return self.criterion(q, k)                      # in forward
"""

from __future__ import annotations

import torch
from torch import Tensor

from psm_kernels import _checks as checks
from psm_kernels.losses import InfoNCELoss, PSMLoss


class NTXentLoss(InfoNCELoss):
    """`InfoNCELoss` with the defaults and the update rule of lightly's NTXentLoss.

    Unlike there, the bank starts empty instead of with random rows that count as negatives, is
    part of the state_dict, and a batch that does not divide its size is kept whole.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows, columns), or 0 for negatives within the batch.
        gather_distributed: as in `PSMLoss`. Not with negatives within the batch, which lightly
            gathers too.
        settings: further keyword arguments of `InfoNCELoss`.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: tuple[int, int] | int = 0,
        gather_distributed: bool = False,
        **settings,
    ):
        settings["gather_distributed"] = gather_distributed
        super().__init__(temperature, memory_bank_size, **settings)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Loss of out0 against out1, (B, D) each; out1 is enqueued if out0 requires grad."""
        update = self.memory_bank is not None and out0.requires_grad
        return super().forward(out0, out1, update=update)


class CrossBatchPSM(PSMLoss):
    """`PSMLoss` with the constructor and the call of pytorch-metric-learning's CrossBatchMemory.

    Rows of `embeddings` that `enqueue_mask` marks are keys, the others queries; the i-th query and
    the i-th key belong together. Labels say which pairs are positive there; here they check that
    and serve statistics, because PSM mines its positives. The bank is read before the keys are
    written (there after), so the batch's other keys are no negatives.

    Args:
        embedding_size: columns D.
        memory_size: slots K.
        temperature: tau > 0.
        settings: keyword arguments of `PSMLoss`.

    Raises:
        ValueError: an argument is wrong; bank and noise state are as before.
    """

    def __init__(
        self,
        embedding_size: int,
        memory_size: int = 1024,
        temperature: float = 0.5,
        **settings,
    ):
        super().__init__(temperature, (memory_size, embedding_size), **settings)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        enqueue_mask: Tensor | None = None,
        **options,
    ):
        """Loss of the queries against their keys and the bank; then the keys are enqueued.

        Args:
            embeddings: (N, D), queries and keys.
            labels: (N,) int64, equal for the two of a pair.
            indices_tuple: None. PSM mines its own pairs.
            enqueue_mask: (N,) bool, True for the keys; half of the rows.
            options: `update`, `return_stats` of `PSMLoss.forward`.
        """
        if indices_tuple is not None:
            raise ValueError(
                f"indices_tuple: got {type(indices_tuple).__name__}, wanted None: PSM mines its "
                "own pairs from the bank"
            )
        checks.check_matrix("embeddings", embeddings, shape=(None, self.memory_bank.dim))
        checks.check_vector("labels", labels, len(embeddings), torch.int64)
        if enqueue_mask is None:
            raise ValueError(
                "enqueue_mask: got None, wanted a bool tensor (N,) that is True for the rows of "
                "the momentum encoder: PSM compares queries with keys"
            )
        checks.check_vector("enqueue_mask", enqueue_mask, len(embeddings), torch.bool)
        query, key = embeddings[~enqueue_mask], embeddings[enqueue_mask]
        if len(query) != len(key):
            raise ValueError(
                f"enqueue_mask: got {len(key)} keys for {len(query)} queries, wanted one each"
            )
        if not torch.equal(labels[~enqueue_mask], labels[enqueue_mask]):
            raise ValueError(
                "labels: got others for the keys than for the queries, wanted the i-th key to be "
                "the i-th query's other view"
            )
        return super().forward(query, key, labels=labels[enqueue_mask], **options)

    def reset_queue(self) -> None:
        self.memory_bank.reset()
