"""What nvcc makes of the headline kernels: registers, spills, tensor and copy instructions, and
the issue slots of the inner loop, which are the speed of the library. Needs nvcc, no GPU."""

import functools
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TRITON = Path(sysconfig.get_path("purelib"), "triton/backends/nvidia/bin")
NVCC = shutil.which("nvcc")
NVDISASM = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=TRITON)
CUOBJDUMP = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=TRITON)
HOPPER_OBJECTS = sorted(ROOT.glob("build/objects/cuda_sm90_*.o"))  # of a build of the checkout

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")

PASS = "bank_pass_sm{}<{}, psm::Selection::kBernoulli, Work::kPass>"
KERNELS = {  # name -> architecture, function
    **{
        f"sm80-{dim}": ("80", PASS.format(80, f"Sm80<BFloat16>::Dim{dim}"))
        for dim in (64, 128, 256)
    },
    **{
        f"sm90-{dim}": ("90a", PASS.format(90, f"Sm90<BFloat16>::Dim{dim}"))
        for dim in (64, 128, 256)
    },
    "sm90-topk": ("90a", "bank_topk_sm90<MineSm90<BFloat16, false>>"),
}


# What ptxas says of setmaxnreg and wgmma that do not run as written, see setup.py: no warning
CHANGED = re.compile("Performance Loss|is injected")


class Compiled(NamedTuple):
    binary: Path
    report: str  # of ptxas -v


def compile_for(source: Path, functions: dict[str, bool], *options) -> Compiled:
    """`functions`: to instantiate, and whether they take tensor maps."""
    lines = [f'#include "csrc/cuda/{f}/kernels_{f}.cuh"' for f in ("sm80", "sm90")]
    lines.append("using namespace psm::cuda;")
    for function, maps in functions.items():
        arguments = "const __grid_constant__ KernelArgs"
        arguments += ", const __grid_constant__ TensorMaps" * maps
        lines.append(f"template __global__ void psm::cuda::{function}({arguments});")
    source.write_text("\n".join(lines) + "\n")
    binary = source.with_suffix(".bin")
    command = [NVCC, "-std=c++17", f"-I{ROOT}", "-Xptxas=-v", *options, "-o", binary, source]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return Compiled(binary, run.stdout + run.stderr)


@functools.cache
def compiled(name: str, folder: Path) -> Compiled:
    arch, function = KERNELS[name]
    machine = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    return compile_for(folder / f"{name}.cu", {function: arch == "90a"}, "-cubin", machine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cubin")


@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_and_no_serialized_products(name, folder):
    report = compiled(name, folder).report
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", report)
    assert "warning" not in report.lower()
    assert not CHANGED.search(report)
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    if name.startswith("sm90"):  # as many as 384 threads can have at launch: setmaxnreg deals them
        assert registers == 168
    assert registers <= 255


@pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump is neither on PATH nor with triton")
@pytest.mark.skipif(not HOPPER_OBJECTS, reason="needs a build of the checkout for sm_90a")
@pytest.mark.parametrize("path", HOPPER_OBJECTS, ids=lambda path: path.stem)
def test_every_hopper_kernel_starts_with_the_registers_that_are_dealt(path):
    """setmaxnreg deals 384 x 168: more are not there; with fewer the consumers wait for ever."""
    run = subprocess.run(
        [CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True
    )
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", run.stdout)
    dealt = {name: use for name, *use in found if "sm90" in name}
    assert len(dealt) >= 16
    assert all(use == ["168", "0"] for use in dealt.values()), dealt


def test_a_debug_build_runs_the_same_products(folder):
    """What it finds would not be of the kernels that ship, if barriers that end cost registers."""
    source = ROOT / "csrc/cuda/sm90/sm90_bfloat16.cu"
    command = [NVCC, "-std=c++17", "-O3", "-DPSM_CUDA_SM90A", "-DPSM_CUDA_TRAP", "-Xptxas=-v"]
    command += ["-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-o", folder / "trap", source]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    report = run.stdout + run.stderr
    assert not CHANGED.search(report), report
    registers = re.findall(r"Used (\d+) registers", report)
    assert len(registers) >= 16
    assert set(registers) == {"168"}
    assert set(re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", report)) == {("0", "0")}


def test_no_spills_on_any_architecture(folder):
    """The headline kernels, as setup.py compiles them for chips other than Hopper."""
    functions = {function: False for arch, function in KERNELS.values() if arch == "80"}
    archs = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    machine = f"-gencode=arch=compute_80,code=[{','.join(archs)}]"
    report = compile_for(folder / "all.cu", functions, "-fatbin", machine).report
    found = re.findall(
        r"for '(sm_\d+)'\n.*\n\s*(\d+) bytes stack.* (\d+) bytes spill loads", report
    )
    assert Counter(found) == Counter({(arch, "0", "0"): len(functions) for arch in archs})


class Instruction(NamedTuple):
    opcode: str
    target: str | None  # label of a branch
    conditional: bool


def sass(cubin: Path) -> list[Instruction | str]:
    """Instructions, and labels as plain strings."""
    text = subprocess.run([NVDISASM, "-c", cubin], capture_output=True, text=True, check=True)
    listing = []
    for line in text.stdout.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            listing.append(label[1])
        elif found := re.match(
            r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(!?U?P\d)?", line
        ):
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            listing.append(Instruction(found[2], target and target[1], bool(found[1] or found[3])))
    return listing


def count_of(instructions: Iterable) -> Counter:
    return Counter(x.opcode.split(".")[0] for x in instructions if isinstance(x, Instruction))


def hot_path(listing: list, needs: dict[str, int]) -> list[Instruction]:
    """The cheapest way around the innermost loop with all products that executes so many of each
    opcode: what a whole tile does, without masks, moves of a shift and other rare branches."""
    places = {line: i for i, line in enumerate(listing) if isinstance(line, str)}
    tensor = [i for i, x in enumerate(listing) if x[0].startswith("HGMMA")]
    jumps = [(i, places.get(x.target, -1)) for i, x in enumerate(listing) if x[0] == "BRA"]
    end, begin = min((i, to) for i, to in jumps if i > tensor[-1] and 0 <= to < tensor[0])

    goal = tuple(needs.values())
    found = {(begin, (0,) * len(goal)): (0, None)}  # place, counts -> steps, where from
    by_place = {begin: [(0,) * len(goal)]}
    for i in range(begin, end + 1):
        x = listing[i]
        for counts in by_place.get(i, ()):
            steps, after, to = found[i, counts][0], counts, -1
            if isinstance(x, Instruction):
                has = (x.opcode.split(".")[0] == opcode for opcode in needs)
                after = tuple(map(min, goal, map(int.__add__, counts, has)))
                to = places.get(x.target, -1) if x.opcode == "BRA" else -1
                steps += 1
            jumps = i < to
            for place in [to] * jumps + [i + 1] * (not jumps or x.conditional):
                known = found.get((place, after))
                if known is None:
                    by_place.setdefault(place, []).append(after)
                if known is None or steps < known[0]:
                    found[place, after] = steps, (i, counts)
    path, at = [], (end + 1, goal)
    while at := found[at][1]:
        path.append(listing[at[0]])
    return [x for x in path[::-1] if isinstance(x, Instruction)]


needs_disassembler = pytest.mark.skipif(
    NVDISASM is None, reason="nvdisasm is neither on PATH nor in triton's package"
)


@needs_disassembler
@pytest.mark.parametrize(
    ("dim", "products", "elements", "group", "most"),
    [  # two products of 64 rows per warpgroup, elements per thread; slots of a group of cells at
        # K = 65,536, k = 5; issue slots per element, where one kernel that did both took 23.4 to 26
        (64, 4 + 8, 64, 128, 23.5),
        (128, 8 + 8, 64, 64, 24.0),
        (256, 16 + 4, 32, 64, 26.0),
    ],
)
def test_issue_slots_of_the_hopper_loops(dim, products, elements, group, most, folder):
    listing = sass(compiled(f"sm90-{dim}", folder).binary)
    opcodes = count_of(listing)
    assert opcodes["UTMALDG"] >= 2
    assert opcodes["LDL"] == opcodes["STL"] == 0
    # exponentials of p and of the weight
    path = hot_path(listing, {"HGMMA": products, "MUFU": 2 * elements})
    sums = (len(path) - products) / elements

    # Mining takes 256 slots at a time, in products of 64 columns: the first, then a loop.
    listing = sass(compiled("sm90-topk", folder).binary)
    needs = {"VIMNMX3": 64, "STG": 256 // group * 2}
    first, second = (len(hot_path(listing, {"HGMMA": n, **needs})) for n in (4, 8))
    panels = dim // 64
    mining = (first + (panels - 1) * (second - first) - 4 * panels) / 128
    print(f"{dim}: {mining:.2f} + {sums:.2f} = {mining + sums:.2f} issue slots per element")
    assert mining + sums <= most, count_of(path).most_common(12)


@needs_disassembler
def test_bank_topk_on_hopper_uses_its_units(folder):
    """A tile of one panel and each further one: four products of 64 x 256, and little else."""
    listing = sass(compiled("sm90-topk", folder).binary)
    opcodes = count_of(listing)
    assert opcodes["UTMALDG"] >= 2
    assert opcodes["HGMMA"] == 8
    assert opcodes["LDL"] == opcodes["STL"] == 0
    first, second = (len(hot_path(listing, {"HGMMA": n})) for n in (4, 8))
    assert second - first <= 48  # products take 512 cycles


@needs_disassembler
def test_the_ampere_kernel_copies_asynchronously_and_uses_tensor_cores(folder):
    listing = sass(compiled("sm80-128", folder).binary)
    opcodes = count_of(listing)
    for opcode in ("LDGSTS", "LDSM", "HMMA", "LDGDEPBAR"):
        assert opcodes[opcode] > 0, opcode
