"""What setup.py makes of the tools it finds, with programs that stand in for g++ and nvcc."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("setuptools")
pytest.importorskip("pybind11")

ROOT = Path(__file__).parents[1]

# Writes the file behind -o, fails for sources or libraries named like $BREAKS.
COMPILER = """#!/usr/bin/env bash
[ -n "$BREAKS" ] && [[ "$*" == *"$BREAKS"* ]] && { echo "x.h:3: error: #error no $BREAKS"; exit 1; }
while [ "$1" != -o ]; do shift; done
echo "${0##*/}" > "$2"
"""
# Answers what setup.py asks nvcc, else compiles like the above.
NVCC = """#!/usr/bin/env bash
here=$(dirname "$(realpath "$0")")
case "$*" in
  *--version*) echo "Cuda compilation tools, release ${RELEASE:-13.0}, V13.0.88"; exit ;;
  *--dryrun*$UNKNOWN*) [ -n "$UNKNOWN" ] && { echo "nvcc fatal: Unsupported"; exit 1; } ;;&
  *--dryrun*) echo "#$ _HERE_=$here" >&2; exit ;;
esac
echo "$*" >> "$here/commands"
echo "$SAYS"
"""


class Machine(NamedTuple):
    """A toolkit, a compiler, and what a build with them leaves."""

    toolkit: Path
    out: Path

    def build(self, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "setup.py", "-q", "build_ext"]
        command += ["--build-lib", self.out, "--build-temp", self.out / "temp"]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PSM_", "CUDA_"))}
        clean |= {"CXX": str(self.toolkit / "bin/g++"), "CUDA_HOME": str(self.toolkit)}
        return subprocess.run(
            command, cwd=ROOT, env=clean | environment, capture_output=True, text=True
        )

    def info(self) -> dict:
        path = self.out / "psm_kernels/_build_info.py"
        return runpy.run_path(str(path)) if path.exists() else {}

    def built(self) -> bool:
        return len(list(self.out.glob("psm_kernels/_C*"))) == 1

    def nvcc_commands(self) -> str:
        path = self.toolkit / "bin/commands"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def machine(tmp_path) -> Machine:
    toolkit = tmp_path / "toolkit"
    for name, text in (("g++", COMPILER), ("nvcc", NVCC + COMPILER.partition("\n")[2])):
        program = toolkit / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    (toolkit / "lib64").mkdir()
    (toolkit / "lib64/libcudart_static.a").touch()
    return Machine(toolkit, tmp_path / "out")


def test_a_found_toolkit_is_used(machine):
    done = machine.build()
    assert done.returncode == 0, done.stderr
    assert machine.built()
    assert machine.info() == {}
    commands = machine.nvcc_commands()
    assert "compute_80,code=[sm_80,sm_86,sm_89,sm_90,sm_100,sm_120,compute_80]" in commands
    assert commands.count("code=sm_90a") == 2
    assert commands.count("\n") == len(list(ROOT.glob("csrc/cuda/*/*.cu")))


def test_the_toolkit_behind_a_wrapper_on_the_path(machine, tmp_path):
    wrapper = tmp_path / "wrapper/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {machine.toolkit}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    path = f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "CUDA_HOME": ""}
    done = machine.build(**environment)
    assert done.returncode == 0, done.stderr
    assert machine.info() == {}
    assert machine.nvcc_commands()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CUDA_HOME": "/no/toolkit"}, "there is no nvcc in /no/toolkit/bin"),
        ({"RELEASE": "12.4"}, "is of CUDA 12.4, 12.5 or newer is needed"),
        ({"UNKNOWN": "sm_"}, "knows none of 80, 86, 89, 90a, 100, 120"),
        ({"BREAKS": "launch.cu"}, "failed: x.h:3: error: #error no launch.cu"),
        ({"BREAKS": "-lcudart_static"}, "failed: x.h:3: error: #error no -lcudart_static"),
    ],
)
def test_without_the_toolkit_the_build_succeeds_and_says_why(machine, environment, reason):
    done = machine.build(**environment)
    assert done.returncode == 0, done.stderr
    assert machine.built()
    assert reason in machine.info()["MISSING_CUDA"]
    assert reason in done.stderr
    asked = machine.build(**environment, PSM_CUDA="1")
    assert asked.returncode != 0
    lines = [line for line in asked.stderr.splitlines() if "PSM_CUDA=1" in line]
    assert len(lines) == 1
    assert lines[0].startswith("psm_kernels: PSM_CUDA=1 was set, but ")
    assert reason in lines[0]
    assert lines[0] == asked.stderr.splitlines()[-1]


def test_without_the_static_runtime_the_build_succeeds_and_says_why(machine):
    (machine.toolkit / "lib64/libcudart_static.a").unlink()
    assert machine.build().returncode == 0
    assert "no libcudart_static.a below" in machine.info()["MISSING_CUDA"]
    assert not machine.nvcc_commands()
    assert machine.build(PSM_CUDA="1").returncode != 0


def test_cuda_can_be_left_out(machine):
    assert machine.build(PSM_CUDA="0", PSM_CUDA_ARCHS="nonsense").returncode == 0
    assert machine.built()
    assert "PSM_CUDA=0" in machine.info()["MISSING_CUDA"]
    assert not machine.nvcc_commands()


@pytest.mark.parametrize(
    "says",
    [
        "(C7504) Potential Performance Loss: 'setmaxnreg' ignored to maintain compatibility",
        "(C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to",
        "(C7517) warpgroup.wait is injected in around line 1245 by compiler to allow use of",
        "(C7519) warpgroup.arrive is injected in around line 10484 by compiler to allow use of",
    ],
)
def test_products_that_the_assembler_changes_are_an_error(machine, says):
    """It only mentions them, and an object that is there is not compiled again."""
    says = f"ptxas info    : {says}"
    for _ in range(2):
        run = machine.build(SAYS=says, PSM_CUDA="1")
        assert run.returncode != 0
        assert says in run.stderr.splitlines()[-1]
        assert not machine.built()
    run = machine.build(SAYS=says)
    assert run.returncode == 0, run.stderr
    assert says in machine.info()["MISSING_CUDA"]
    assert machine.build(SAYS="ptxas info : 0 bytes gmem", PSM_CUDA="1").returncode == 0


def test_what_the_assembler_changed_is_an_error_after_another_one(machine):
    """The objects of a build that failed elsewhere are kept, and with them nothing that it said."""
    says = "ptxas info : (C7512) wgmma.mma_async instructions are serialized due to"
    breaks = "isa_portable.cpp"
    assert machine.build(SAYS=says, PSM_CUDA="1", BREAKS=breaks).returncode != 0
    run = machine.build(SAYS=says, PSM_CUDA="1")
    assert run.returncode != 0
    assert says in run.stderr


def test_a_debug_build_is_asked_for(machine):
    assert machine.build().returncode == 0
    assert "-DPSM_CUDA_TRAP" not in machine.nvcc_commands()
    assert machine.build(PSM_CUDA_TRAP="1").returncode == 0
    sources = len(list(ROOT.glob("csrc/cuda/*/*.cu")))
    assert machine.nvcc_commands().count("-DPSM_CUDA_TRAP") == sources


def test_a_broken_cpp_compiler_is_an_error(machine):
    done = machine.build(BREAKS="isa_portable.cpp")
    assert done.returncode != 0
    assert "error: #error no isa_portable.cpp" in done.stderr


def test_architectures_that_nvcc_does_not_know(machine):
    done = machine.build(UNKNOWN="sm_120")
    assert done.returncode == 0, done.stderr
    assert machine.info() == {}
    commands = machine.nvcc_commands()
    assert "sm_120" not in commands
    assert "sm_89,sm_90,sm_100,compute_80" in commands
    done = machine.build(UNKNOWN="sm_120", PSM_CUDA_ARCHS="80,120")
    assert done.returncode != 0
    assert "does not know 120" in done.stderr


def test_named_architectures(machine):
    assert machine.build(PSM_CUDA_ARCHS="86 90").returncode == 0
    commands = machine.nvcc_commands()
    assert "compute_86,code=[sm_86,sm_90,compute_86]" in commands
    assert "90a" not in commands


@pytest.mark.parametrize(
    "environment",
    [{"PSM_CUDA_ARCHS": "75"}, {"PSM_CUDA_ARCHS": "sm_80"}, {"PSM_CUDA_ARCHS": ""},
     {"PSM_CUDA": "yes"}, {"PSM_CUDA_TRAP": "yes"}],
)  # fmt: skip
def test_bad_settings_are_errors(machine, environment):
    done = machine.build(**environment)
    assert done.returncode != 0
    (name,) = environment
    assert f"{name}: got {environment[name]!r}, wanted" in done.stderr


def test_without_a_compiler_the_build_succeeds_and_says_why(machine):
    done = machine.build(CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert not machine.built()
    assert "no-such-compiler not found" in machine.info()["MISSING"]
    asked = machine.build(CXX="no-such-compiler", PSM_CUDA="1")
    assert asked.returncode != 0
    assert "PSM_CUDA=1 was set, but" in asked.stderr
    assert "no-such-compiler not found" in asked.stderr


def test_the_reason_of_an_earlier_build_does_not_stay(machine):
    machine.build(CXX="no-such-compiler")
    assert machine.build().returncode == 0
    assert machine.info() == {}
