import subprocess
import sys

import torch

from psm_kernels import backends


def test_the_command_prints_the_table_and_what_auto_picks():
    run = subprocess.run(
        [sys.executable, "-m", "psm_kernels"], capture_output=True, text=True, check=True
    )
    for name in backends.TABLE:
        assert name in run.stdout
    picked = backends.choose("auto", torch.ones(2, 8)).__name__.rpartition(".")[2]
    assert f"auto on cpu: {picked}" in run.stdout


def test_importing_needs_torch_and_nothing_else():
    """The extras, triton among them, must stay out of the import."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['triton', 'torchvision', 'sklearn', "
        "'matplotlib', 'tqdm', 'pandas'])); import psm_kernels, psm_kernels.evaluate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
