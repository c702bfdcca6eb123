"""Builds psm_kernels._C with setuptools, pybind11 and ninja; metadata is in pyproject.toml.

The module includes no torch header and links no torch library, so one build serves every torch.
A CUDA toolkit that is found compiles csrc/cuda as well; where that cannot be done the build goes on
without it, says why and leaves the reason in psm_kernels/_build_info.py.

Environment: CXX names the compiler; PSM_SANITIZE=address,undefined makes an instrumented build;
CUDA_HOME names the toolkit (else nvcc of PATH); PSM_CUDA=0 leaves the CUDA kernels out, =1 makes it
an error that they cannot be built; PSM_CUDA_ARCHS names the architectures (80,86,89,90a,100,120;
100 and 120 get the code of 80). PSM_CUDA_TRAP=1 makes a debug build, whose kernels for Hopper say
which barrier they wait for, and end, when that takes two seconds.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = Path("csrc/cpu")
CUDA = Path("csrc/cuda")

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi"]
AVX512 = [*AVX2, *(f"-mavx512{name}" for name in ("f", "bw", "dq", "vl"))]
VNNI = [*AVX512, "-mavx512vnni"]
OWN_FLAGS = {  # nothing else may be compiled for more than the baseline processor
    "isa_avx2.cpp": AVX2,
    "isa_avx512.cpp": AVX512,
    "isa_avx512_vnni.cpp": VNNI,
    "isa_avx512_bf16.cpp": [*VNNI, "-mavx512bf16"],
}
X86 = platform.machine() in ("x86_64", "AMD64")


def cpu_sources() -> list[Path]:
    found = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / CPU).rglob("*.cpp")]
    own = [path.relative_to(ROOT) for path in sorted(found)]
    return [path for path in own if X86 or path.name not in OWN_FLAGS]


def find_compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


class NoCuda(Exception):
    """One line: why the CUDA kernels are not built."""


OLDEST_CUDA = (12, 5)  # the first with cudaGetDriverEntryPointByVersion
OLDEST_ARCH = 80  # cp.async, and mma on bf16
ARCHS = "80,86,89,90a,100,120"


class Cuda(NamedTuple):
    """A CUDA toolkit and what to compile with it."""

    home: Path
    archs: tuple[str, ...]
    left_out: tuple[str, ...]  # defaults that this nvcc does not know

    def sources(self) -> list[Path]:
        """sm_90a instructions exist nowhere else, so those sources are left out without it."""
        found = sorted(path.relative_to(ROOT) for path in (ROOT / CUDA).rglob("*.cu"))
        return [path for path in found if "90a" in self.archs or path.parent.name != "sm90"]

    def flags(self, source: Path) -> list[str]:
        define = ["-DPSM_CUDA_SM90A"] * ("90a" in self.archs)
        define += ["-DPSM_CUDA_TRAP"] * (os.environ.get("PSM_CUDA_TRAP") == "1")
        if source.parent.name == "sm90":
            return ["-gencode=arch=compute_90a,code=sm_90a", *define]
        # One run of the front end serves all: PTX of the oldest becomes machine code for each, and
        # is kept for chips that are not named.
        real = sorted({int(arch.rstrip("af")) for arch in self.archs})
        code = ",".join([*(f"sm_{arch}" for arch in real), f"compute_{real[0]}"])
        return [f"-gencode=arch=compute_{real[0]},code=[{code}]", *define]

    def libraries(self) -> list[str]:
        places = [self.home / "lib64", *self.home.glob("targets/*/lib"), self.home / "lib"]
        place = next((p for p in places if (p / "libcudart_static.a").exists()), None)
        if place is None:
            raise NoCuda(f"there is no libcudart_static.a below {self.home}")
        return [f"-L{place}", "-lcudart_static", "-lrt", "-ldl"]

    def describe(self) -> str:
        without = f", without {', '.join(self.left_out)}, unknown to this nvcc"
        return ", ".join(self.archs) + without * bool(self.left_out)


def find_cuda() -> Cuda:
    """The toolkit and the architectures that it can compile for, or NoCuda."""
    if os.environ.get("PSM_CUDA") == "0":
        raise NoCuda("PSM_CUDA=0 was set")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise NoCuda(f"there is no nvcc in {f'{home}/bin' if home else 'PATH'}")
    # nvcc may be a link or a script: it says itself where the toolkit is.
    place = re.search(r"_HERE_=(.*)", dry_run(nvcc).stderr)
    version = re.search(r"release (\d+)\.(\d+)", ask(nvcc, "--version").stdout)
    if place is None or version is None:
        raise NoCuda(f"{nvcc} names neither its toolkit nor its version")
    if tuple(map(int, version.groups())) < OLDEST_CUDA:
        least = ".".join(map(str, OLDEST_CUDA))
        raise NoCuda(f"{nvcc} is of CUDA {version[1]}.{version[2]}, {least} or newer is needed")
    archs, named = wanted_archs()
    known = [dry_run(nvcc, arch).returncode == 0 for arch in archs]
    left_out = tuple(arch for arch, there in zip(archs, known, strict=True) if not there)
    if left_out and named:
        raise SystemExit(f"PSM_CUDA_ARCHS: {nvcc} does not know {', '.join(left_out)}")
    if len(left_out) == len(archs):
        raise NoCuda(f"{nvcc} knows none of {', '.join(archs)}")
    archs = tuple(arch for arch in archs if arch not in left_out)
    return Cuda(Path(place[1].strip()).resolve().parent, archs, left_out)


def wanted_archs() -> tuple[tuple[str, ...], bool]:
    """The architectures, and whether the user named them."""
    names = os.environ.get("PSM_CUDA_ARCHS", ARCHS)
    archs = tuple(arch for arch in re.split(r"[ ,;]+", names) if arch)
    numbers = [re.fullmatch(r"(\d+)[af]?", arch) for arch in archs]
    if not archs or not all(number and int(number[1]) >= OLDEST_ARCH for number in numbers):
        raise SystemExit(f"PSM_CUDA_ARCHS: got {names!r}, wanted numbers from 80 on, as in 80,90a")
    return archs, "PSM_CUDA_ARCHS" in os.environ


def ask(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


def dry_run(nvcc: str, arch: str | None = None) -> subprocess.CompletedProcess:
    """What nvcc would do for an architecture; it fails for those that it does not know."""
    chip = [f"-gencode=arch=compute_{arch},code=sm_{arch}"] if arch else []
    return ask(nvcc, "--dryrun", *chip, "-x", "cu", os.devnull)


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:  # no build isolation and no package index: torch has a copy
        torch = importlib.util.find_spec("torch")
        copy = Path(torch.origin).parent / "include" if torch else Path()
        if not (copy / "pybind11").exists():
            raise
        return str(copy)
    return pybind11.get_include()


def common_flags() -> list[str]:
    version = re.search(r'__version__ = "(.*)"', (ROOT / "psm_kernels/__init__.py").read_text())[1]
    source_id = runpy.run_path(str(ROOT / "psm_kernels/_csrc.py"))["source_id"]
    includes = (sysconfig.get_path("include"), pybind11_include())
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"]
    flags += ["-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"]
    flags += [f'-DPSM_SOURCE_ID="{source_id(ROOT / "psm_kernels", version)}"', f"-DPSM_X86={X86:d}"]
    return flags + sanitizer_flags() + [f"-I{path}" for path in includes]


def sanitizer_flags() -> list[str]:
    names = os.environ.get("PSM_SANITIZE")
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1"]


def run_parallel(objects: dict[Path, list[str]], build: Path) -> str:
    """Compiles each object with its command, with ninja where it can be imported, and gives what
    the compilers said."""
    try:
        import ninja
    except ImportError:
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            return "".join(pool.map(run, objects.values()))
        finally:
            pool.shutdown(cancel_futures=True)
    lines = ["rule cxx", "  command = $run -MD -MF $out.d", "  depfile = $out.d", "  deps = gcc"]
    for path, command in objects.items():
        text = shlex.join(command).replace("$", "$$")
        lines += [f"build {path.name}: cxx", f"  run = {text}"]
    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    return run([str(Path(ninja.BIN_DIR) / "ninja"), "--quiet", "-C", str(build)])


def run(command: list[str]) -> str:
    """Shows and gives what the command printed, raises CalledProcessError with it on failure."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        print(done.stdout, end="", file=sys.stderr, flush=True)
    done.check_returncode()
    return done.stdout


# What ptxas says, as mere information, of products that do not run as written: each is waited for,
# a wait or a fence was added, or the registers stay as they were dealt at launch. By words, because
# it has many codes for it: CUDA 13.0 has C7504 to C7519.
SERIALIZED = re.compile(
    r".*(?:wgmma\S* instructions are serialized|warpgroup\.\w+ is injected|'setmaxnreg' ignored).*"
)


def refuse_serialized(output: str, objects: Iterable[Path]) -> None:
    if found := SERIALIZED.search(output):
        for path in objects:  # the next build must see it again
            path.unlink(missing_ok=True)
        raise NoCuda(f"products would not run as written: {found[0].strip()[:300]}")


def first_error(output: str) -> str:
    """The line to show of a compiler's output; ninja's own begin with FAILED."""
    lines = [line.strip() for line in output.splitlines() if not line.startswith("FAILED")]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line)]
    return (errors or lines or ["it said nothing"])[0][:300]


class BuildKernels(build_ext):
    def run(self) -> None:
        self.destination = ROOT if self.inplace else Path(self.build_lib).resolve()
        # A checkout keeps its objects, so that an unchanged CUDA source is compiled once.
        kept = ROOT / "build/objects"
        self.object_dir = kept if self.inplace else Path(self.build_temp).resolve()
        self.reasons = {}
        self.reason_file().unlink(missing_ok=True)
        for name in ("PSM_CUDA", "PSM_CUDA_TRAP"):
            if os.environ.get(name, "0") not in ("0", "1"):
                raise SystemExit(f"{name}: got {os.environ[name]!r}, wanted 0 or 1")
        if find_compiler() is None:
            wanted = os.environ.get("CXX", "g++ or clang++")
            self.do_without("MISSING", f"a C++ compiler ({wanted} not found)")
            self.extensions = []
        super().run()

    def reason_file(self) -> Path:
        return self.destination / "psm_kernels/_build_info.py"

    def do_without(self, name: str, what: str) -> None:
        """Says what will not be there, now and, through the backends, when it is missed."""
        if os.environ.get("PSM_CUDA") == "1":
            raise SystemExit(f"psm_kernels: PSM_CUDA=1 was set, but this build is without {what}")
        text = f"built without {what}"
        print(f"psm_kernels: {text}", file=sys.stderr)
        self.reasons[name] = text
        lines = [f"{key} = {value!r}\n" for key, value in self.reasons.items()]
        self.reason_file().parent.mkdir(parents=True, exist_ok=True)
        self.reason_file().write_text('"""Written by setup.py."""\n\n' + "".join(lines))

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        for folder in (self.object_dir, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            self.build_with(find_cuda(), target)
        except NoCuda as reason:
            self.do_without("MISSING_CUDA", f"the CUDA kernels ({reason})")
            self.build_with(None, target)

    def build_with(self, cuda: Cuda | None, target: Path) -> None:
        compiler, flags = find_compiler(), common_flags()
        objects, libraries, defines = {}, [], []
        if cuda is not None:  # the longest jobs go first
            libraries = cuda.libraries()
            nvcc = [str(cuda.home / "bin/nvcc"), "-ccbin", compiler, "-std=c++17", "-O3"]
            nvcc += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
            for source in cuda.sources():
                command = [*nvcc, *cuda.flags(source), "-c", str(ROOT / source), "-o"]
                objects[self.object_dir / f"cuda_{source.stem}.o"] = command
            defines = ["-DPSM_CUDA", f'-DPSM_CUDA_BUILT_FOR="{cuda.describe()}"']
            source = ROOT / CUDA / "host/bindings.cpp"
            command = [compiler, *flags, *defines, "-c", str(source), "-o"]
            objects[self.object_dir / "cuda_bindings.o"] = command
        for source in cpu_sources():
            own = defines if source.name == "bindings.cpp" else OWN_FLAGS.get(source.name, [])
            command = [compiler, *flags, *own, "-c", str(ROOT / source), "-o"]
            objects[self.object_dir / f"{source.stem}.o"] = command
        for path, command in objects.items():
            command.append(str(path))
        for left in set(self.object_dir.glob("*.o")) - set(objects):  # of a source that is gone
            left.unlink()
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
        shared = shared if sys.platform == "darwin" else ["-shared"]
        link = [compiler, *shared, "-pthread", *sanitizer_flags(), *map(str, objects)]
        try:
            said = run_parallel(objects, self.object_dir)
            refuse_serialized(said, objects)
            run([*link, *libraries, "-o", str(target)])
        except subprocess.CalledProcessError as error:
            if cuda is None:
                raise
            refuse_serialized(error.stdout, objects)
            line = first_error(error.stdout)
            raise NoCuda(f"the build with {cuda.home} failed: {line}") from error


setup(
    ext_modules=[Extension("psm_kernels._C", list(map(str, cpu_sources())))],
    cmdclass={"build_ext": BuildKernels},
)
