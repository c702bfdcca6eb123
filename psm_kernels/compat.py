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
and the CrossEntropyLoss behind it.

    self.criterion = InfoNCELoss(T, (K, dim))        # in __init__; PSMLoss(T, (K, dim)) for PSM
    return self.criterion(q, k)                      # in forward

Its checkpoints have `queue` and `queue_ptr` on the model itself, where no loss can see them:

    model.load_state_dict(from_moco(checkpoint["state_dict"], model))
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from psm_kernels import checks
from psm_kernels.bank.collectives import rank_and_world
from psm_kernels.losses import BankLoss, InfoNCELoss, PSMLoss


def from_moco(
    state_dict: Mapping[str, Tensor], model: nn.Module, *, view: int | None = None
) -> dict[str, Tensor]:
    """A MoCo-like model's state_dict as that of `model`, whose loss holds the bank.

    `queue` and `queue_ptr`, under any prefix, become the bank of the one loss of `model`, with unit
    rows and its noise state as it is. Prefixes `module.` that `model` has not are dropped.

    Args:
        state_dict: of the old model, as saved by facebookresearch/moco, lightly or solo-learn.
        model: holds exactly one loss of this library with a bank.
        view: which of the two queues of solo-learn's MoCo, (2, D, K), to take: 0 or 1.

    Raises:
        ValueError: there is not one queue and one loss for it, or the sizes differ.
    """
    losses = [(n, m) for n, m in model.named_modules() if isinstance(m, BankLoss) and m.memory_bank]
    if len(losses) != 1:
        raise ValueError(f"model: got {len(losses)} losses with a bank, wanted one")
    own = model.state_dict()
    found = {}
    for key, value in state_dict.items():
        while key not in own and key.startswith("module."):
            key = key.removeprefix("module.")
        found[key] = value
    queues = [key for key in found if key.rpartition(".")[2] == "queue"]
    if len(queues) != 1:
        raise ValueError(f"state_dict: got {len(queues)} entries named queue, wanted one")
    queue, pointer = found.pop(queues[0]), found.pop(queues[0] + "_ptr", None)
    if queue.ndim == 3 and view in (0, 1):
        queue = queue[view]
    elif queue.ndim == 3:
        raise ValueError(f"view: got {view!r} for a queue {tuple(queue.shape)}, wanted 0 or 1")
    name, loss = losses[0]
    prefix = f"{name}." if name else ""
    bank = loss.memory_bank.from_queue(queue, pointer)
    found |= {f"{prefix}memory_bank.{n}": x for n, x in bank.items()}
    found.setdefault(prefix + "rng_state", loss.rng_state)
    return found


class NTXentLoss(InfoNCELoss):
    """`InfoNCELoss` with the defaults and the update rule of lightly's NTXentLoss.

    Unlike there, the bank starts empty instead of with random rows that count as negatives, is
    part of the state_dict, and a batch that does not divide its size is kept whole.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows, columns), or 0 for negatives within the batch.
        gather_distributed: as in `PSMLoss`. Negatives within the batch, which lightly gathers too,
            are those of one process here: refused where there are several.
        settings: further keyword arguments of `InfoNCELoss`.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: tuple[int, int] | int = 0,
        gather_distributed: bool = False,
        **settings,
    ):
        if gather_distributed and not dist.is_available():
            raise ValueError("gather_distributed: got True, but this torch has no distributed part")
        in_batch = isinstance(memory_bank_size, int) and memory_bank_size == 0
        settings["gather_distributed"] = gather_distributed and not in_batch
        super().__init__(temperature, memory_bank_size, **settings)
        self.wants_all_views = gather_distributed and in_batch

    def forward(
        self,
        out0: Tensor,
        out1: Tensor,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        update: bool | None = None,
    ) -> Tensor:
        """Loss of out0 against out1, (B, D) each; update=None enqueues out1 if out0 requires grad.
        `labels` and `ids` as in `InfoNCELoss`."""
        if self.wants_all_views and (world := rank_and_world(self.process_group)[1]) > 1:
            raise ValueError(
                f"gather_distributed: got True for negatives within the batch of {world} "
                "processes, wanted a memory bank, or False"
            )
        if update is None:
            update = self.memory_bank is not None and out0.requires_grad
        return super().forward(out0, out1, labels=labels, ids=ids, update=update)


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
            options: `ids` of the pairs (N / 2,), `update`, `return_stats` of `PSMLoss.forward`.
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
