"""What nvcc makes of the headline kernels: registers, spills, tensor and copy instructions, and
the issue slots of the inner loop, which are the speed of the library. Needs nvcc, no GPU."""

import functools
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TRITON = Path(sysconfig.get_path("purelib"), "triton/backends/nvidia/bin")
NVCC = shutil.which("nvcc")
NVDISASM = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=TRITON)

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")

KERNELS = {  # name -> architecture, configuration
    "sm80-64": ("80", "Sm80<BFloat16>::Dim64"),
    "sm80-128": ("80", "Sm80<BFloat16>::Dim128"),
    "sm80-256": ("80", "Sm80<BFloat16>::Dim256"),
    "sm90-64": ("90a", "Sm90<BFloat16>::Dim64"),
    "sm90-128": ("90a", "Sm90<BFloat16>::Dim128"),
    "sm90-256": ("90a", "Sm90<BFloat16>::Dim256"),
}


class Compiled(NamedTuple):
    cubin: Path
    report: str  # of ptxas -v


@functools.cache
def compiled(name: str, folder: Path) -> Compiled:
    arch, config = KERNELS[name]
    maps = ", const __grid_constant__ TensorMaps" if arch == "90a" else ""
    source = folder / f"{name}.cu"
    source.write_text(
        '#include "csrc/cuda/pass_kernel.cuh"\nusing namespace psm::cuda;\n'
        f"template __global__ void psm::cuda::bank_pass_sm{arch[:2]}<{config}, "
        "psm::Selection::kBernoulli, Work::kPass>"
        f"(const __grid_constant__ PassArgs{maps});\n"
    )
    cubin = source.with_suffix(".cubin")
    command = [NVCC, "-std=c++17", f"-I{ROOT}", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += ["-Xptxas=-v", "-cubin", "-o", cubin, source]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return Compiled(cubin, run.stdout + run.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cubin")


@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_and_no_serialized_products(name, folder):
    report = compiled(name, folder).report
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", report)
    assert "warning" not in report.lower()  # C7508, C7510: setmaxnreg or wgmma not as written
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    assert registers <= (168 if name.startswith("sm90") else 255)


class Instruction(NamedTuple):
    opcode: str
    target: str | None  # label of a branch


def sass(cubin: Path) -> list[Instruction | str]:
    """Instructions, and labels as plain strings."""
    text = subprocess.run([NVDISASM, "-c", cubin], capture_output=True, text=True, check=True)
    listing = []
    for line in text.stdout.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            listing.append(label[1])
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", line):
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            listing.append(Instruction(found[1], target and target[1]))
    return listing


def hot_loop(listing: list, marker: str) -> list[Instruction]:
    """The innermost loop around all `marker` instructions, without what a whole tile branches
    over: masks of a partial tile and the move of a row's shift, 60 instructions or more each."""
    places = {line: i for i, line in enumerate(listing) if isinstance(line, str)}
    tensor = [i for i, x in enumerate(listing) if x[0].startswith(marker)]
    jumps = [(i, places.get(x.target, -1)) for i, x in enumerate(listing) if x[0] == "BRA"]
    end, begin = next((i, to) for i, to in jumps if i > tensor[-1] and 0 <= to < tensor[0])
    skipped = set()
    for i, to in jumps:
        if begin < i < to <= end and to - i > 60 and not any(i < t < to for t in tensor):
            skipped.update(range(i + 1, to))
    inside = (listing[i] for i in range(begin, end + 1) if i not in skipped)
    return [x for x in inside if isinstance(x, Instruction)]


@pytest.mark.skipif(NVDISASM is None, reason="nvdisasm is neither on PATH nor in triton's package")
@pytest.mark.parametrize(
    ("name", "products", "elements", "most"),
    [  # three products of 64 rows per warpgroup; elements per thread; issue slots per element
        ("sm90-64", 4 + 4 + 8, 64, 26.0),
        ("sm90-128", 8 + 8 + 8, 64, 26.0),
        ("sm90-256", 16 + 16 + 4, 32, 32.0),  # smaller tiles; the products take 48 slots' time
    ],
)
def test_issue_slots_of_the_hopper_loop(name, products, elements, most, folder):
    listing = sass(compiled(name, folder).cubin)
    opcodes = Counter(x.opcode.split(".")[0] for x in listing if isinstance(x, Instruction))
    assert opcodes["UTMALDG"] >= 2
    assert opcodes["LDL"] == opcodes["STL"] == 0
    loop = hot_loop(listing, "HGMMA")
    count = Counter(x.opcode.split(".")[0] for x in loop)
    assert count["HGMMA"] == products
    slots = (len(loop) - products) / elements
    print(f"{name}: {slots:.2f} issue slots per element")
    assert slots <= most, count.most_common(12)


@pytest.mark.skipif(NVDISASM is None, reason="nvdisasm is neither on PATH nor in triton's package")
def test_the_ampere_kernel_copies_asynchronously_and_uses_tensor_cores(folder):
    listing = sass(compiled("sm80-128", folder).cubin)
    opcodes = Counter(x.opcode.split(".")[0] for x in listing if isinstance(x, Instruction))
    for opcode in ("LDGSTS", "LDSM", "HMMA", "LDGDEPBAR"):
        assert opcodes[opcode] > 0, opcode
