"""The layers of train.py: a torchvision ResNet with a projector, and the MLP of its heads."""

import torchvision
from torch import nn


def make_encoder(arch: str, dim: int, *, stem: str = "small", channels: int = 3) -> nn.Sequential:
    """A backbone and a projector: images (B, C, H, W) to rows (B, dim).

    Args:
        arch: a ResNet of torchvision, such as "resnet18".
        dim: columns of the projection.
        stem: first layers, "small" for images of about 32 x 32, "large" for ImageNet's.
        channels: of the images.
    """
    backbone = torchvision.models.get_model(arch)
    features = backbone.fc.in_features
    if stem == "small":  # PSM's for CIFAR: it keeps a max-pool, stride 1, no padding
        backbone.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        backbone.maxpool = nn.MaxPool2d(3, stride=1)
    elif channels != 3:
        backbone.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    backbone.fc = nn.Identity()
    return nn.Sequential(backbone, mlp(features, dim))


def mlp(inputs: int, outputs: int, hidden: int = 512) -> nn.Sequential:
    """Projector and predictor of PSM's released code: no bias, batch norm without weights last."""
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs, bias=False),
        nn.BatchNorm1d(outputs, affine=False),
    )
