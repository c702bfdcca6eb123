"""Augmentations of a whole batch at once: each image has its own numbers, no image its own call."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

NUMBERS = 8  # uniform numbers of an image for a view; seven are used, and two views fill a block


class Plain:
    """Images as the networks take them: in [0, 1], normalized, `size` pixels a side."""

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]):
        self.size = size
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (mean, std))

    def __call__(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        """uint8 (B, C, H, W) to float (B, C, size, size); `numbers` (B, NUMBERS) in [0, 1)."""
        images = images.float() / 255
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="area")
        return (images - self.mean) / self.std


class CropFlipLight(Plain):
    """A part of the image stretched to the whole, perhaps mirrored, brighter or darker.

    The crop is drawn as torchvision's RandomResizedCrop draws it, but for a side that would be too
    long, which is cut where that one draws again.

    Args:
        size, mean, std: of `Plain`.
        scale: least and largest share of the area.
        ratio: largest of the sides' quotient, either way.
        light: largest change of brightness and of contrast.
    """

    def __init__(self, size, mean, std, *, scale=(0.4, 1.0), ratio=4 / 3, light=0.4):
        super().__init__(size, mean, std)
        self.scale, self.ratio, self.light = scale, ratio, light

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        area, ratio, x, y, flip, bright, contrast, _ = numbers.T
        low, high = self.scale
        area = low + (high - low) * area
        ratio = torch.exp(math.log(self.ratio) * (2 * ratio - 1))
        width, height = (
            side.clamp_max(1) for side in ((area * ratio).sqrt(), (area / ratio).sqrt())
        )
        theta = images.new_zeros(
            len(images), 2, 3, dtype=torch.float32
        )  # output to input, in [-1, 1]
        theta[:, 0, 0] = torch.where(flip < 0.5, -width, width)
        theta[:, 0, 2] = (1 - width) * (2 * x - 1)
        theta[:, 1, 1] = height
        theta[:, 1, 2] = (1 - height) * (2 * y - 1)
        grid = F.affine_grid(theta, [*images.shape[:2], self.size, self.size], align_corners=False)
        images = F.grid_sample(
            images.float() / 255, grid, padding_mode="border", align_corners=False
        )

        bright, contrast = (
            1 + self.light * (2 * n - 1)[:, None, None, None] for n in (bright, contrast)
        )
        images = (images * bright).clamp(0, 1)
        mean = images.mean((1, 2, 3), keepdim=True)
        images = ((images - mean) * contrast + mean).clamp(0, 1)
        return (images - self.mean) / self.std
