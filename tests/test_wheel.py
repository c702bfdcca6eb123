"""What can drift in .ci/wheel, in seconds; the script itself takes half an hour."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHEEL = ROOT / ".ci/wheel"

if shutil.which("bash") is None or not WHEEL.exists():
    pytest.skip("wants bash and a checkout", allow_module_level=True)


@pytest.mark.parametrize("script", sorted((ROOT / ".ci").iterdir()), ids=lambda path: path.name)
def test_the_scripts_can_be_parsed(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_the_tests_of_a_wheel_are_there():
    """pytest says nothing where it is told to leave out a test that does not exist."""
    script = WHEEL.read_text()
    path, name = re.search(r"--deselect (\S+)::(\w+)", script).groups()
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_checkout_is_not_taken_for_a_wheel(tmp_path):
    python = tmp_path / "python"  # the name that the script calls
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", WHEEL, "check"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == f"{ROOT / 'psm_kernels/__init__.py'}\n"
    assert done.stderr == "psm_kernels is not the installed package\n"


def test_the_pythons_are_those_of_the_metadata():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    builds = settings["tool"]["cibuildwheel"]["build"].split()
    least = settings["project"]["requires-python"].removeprefix(">=").replace(".", "")
    assert builds[0] == f"cp{least}-*"
    readme = re.search(r"Python 3\.(\d+) to 3\.(\d+)", (ROOT / "README.md").read_text())
    assert builds == [f"cp3{minor}-*" for minor in range(int(readme[1]), int(readme[2]) + 1)]
    assert settings["tool"]["cibuildwheel"]["linux"]["environment"]["PSM_CUDA"] == "1"
