"""`python -m psm_kernels` prints the versions and the table of backends."""

import torch

from psm_kernels import __version__
from psm_kernels.backends import registry

print(f"psm_kernels {__version__}, torch {torch.__version__}")
print(registry.describe())
