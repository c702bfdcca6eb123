"""Batch norm over many processes, or in one process as many would have it."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin


class SplitBatchNorm(_BatchNorm):
    """Normalizes `splits` parts of a batch each by its own mean and variance.

    That is what as many data-parallel processes do without SyncBatchNorm, so that one process can
    repeat their run. The running statistics are the mean over the parts
    (facebookresearch/moco, the CIFAR-10 demo, which interleaves the parts).
    """

    splits = 1

    def _check_input_dim(self, x):
        """Any shape (B, C, ...)."""

    def forward(self, x):
        if not self.training and self.running_mean is not None:
            return super().forward(x)
        s = self.splits
        if len(x) % s:
            raise ValueError(f"batch: got {len(x)} rows, wanted a multiple of splits = {s}")
        wide = x.unflatten(0, (s, -1)).transpose(0, 1).flatten(1, 2)  # (B / s, s C, ...)
        affine = [None if p is None else p.repeat(s) for p in (self.weight, self.bias)]
        mean = var = momentum = None
        if tracked := self.training and self.track_running_stats:
            mean, var = self.running_mean.repeat(s), self.running_var.repeat(s)
            momentum = self.momentum
            if momentum is None:  # as in torch: the mean over all batches so far
                momentum = 1 / (float(self.num_batches_tracked) + 1)
        wide = nn.functional.batch_norm(
            wide, mean, var, *affine, True, 0.0 if momentum is None else momentum, self.eps
        )
        if tracked:
            with torch.no_grad():
                self.running_mean.copy_(mean.view(s, -1).mean(0))
                self.running_var.copy_(var.view(s, -1).mean(0))
                self.num_batches_tracked += 1
        return wide.unflatten(1, (s, -1)).transpose(0, 1).flatten(0, 1)


def set_batch_norm(module: nn.Module, *, sync: bool = False, splits: int = 1) -> nn.Module:
    """Batch norm over all processes (`sync`) or over parts of a batch (`splits`) instead.

    Raises:
        ValueError: `sync` where a parameter of the module is on a CPU; a lazy layer before
            its first batch.
    """
    for parameter in module.parameters() if sync else ():
        if parameter.device.type == "cpu":
            raise ValueError("sync: synchronized batch norm needs GPUs, got the device cpu")
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and splits > 1:
            if isinstance(layer, LazyModuleMixin):
                raise ValueError(
                    f"splits: got {layer}, wanted its sizes: run a batch through first"
                )
            layer.__class__, layer.splits = SplitBatchNorm, splits
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if sync else module
