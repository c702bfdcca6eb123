"""Builds psm_kernels._C with setuptools, pybind11 and ninja; metadata is in pyproject.toml.

The module includes no torch header and links no torch library, so one build serves every torch.
Environment: CXX names the compiler; PSM_SANITIZE=address,undefined makes an instrumented build;
PSM_CUDA=1 adds the CUDA kernels, which no GPU has run yet and `auto` does not pick; PSM_CUDA_ARCHS
names the architectures (80,86,89,90a,120); CUDA_HOME the toolkit.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = Path("csrc/cpu")
CUDA = Path("csrc/cuda")

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi"]
AVX512 = [*AVX2, *(f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", "vnni"))]
SOURCES = {  # source -> flags of its own: nothing else may be compiled for more than the baseline
    Path("csrc/bindings.cpp"): [],
    CPU / "bank_pass.cpp": [],
    CPU / "finish.cpp": [],
    CPU / "threads.cpp": [],
    CPU / "isa_portable.cpp": [],
}
X86 = platform.machine() in ("x86_64", "AMD64")
if X86:
    SOURCES[CPU / "isa_avx2.cpp"] = AVX2
    SOURCES[CPU / "isa_avx512.cpp"] = AVX512
    SOURCES[CPU / "isa_avx512_bf16.cpp"] = [*AVX512, "-mavx512bf16"]


def find_compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


class Cuda(NamedTuple):
    """A CUDA toolkit and what to compile with it."""

    home: Path
    archs: tuple[str, ...]

    def sources(self) -> list[Path]:
        """sm_90a instructions exist nowhere else, so those sources are left out without it."""
        found = sorted(path.relative_to(ROOT) for path in (ROOT / CUDA).glob("*.cu"))
        return [path for path in found if "90a" in self.archs or "sm90" not in path.name]

    def flags(self, source: Path) -> list[str]:
        if "sm90" in source.name:
            return ["-gencode=arch=compute_90a,code=sm_90a", *self.defines()]
        # One run of the front end serves all: PTX of the oldest becomes machine code for each, and
        # is kept for chips that are not named.
        real = sorted({int(arch.rstrip("af")) for arch in self.archs})
        code = ",".join([*(f"sm_{arch}" for arch in real), f"compute_{real[0]}"])
        return [f"-gencode=arch=compute_{real[0]},code=[{code}]", *self.defines()]

    def defines(self) -> list[str]:
        names = [f'-DPSM_CUDA_ARCHS="{",".join(self.archs)}"']
        return names + ["-DPSM_CUDA_SM90A"] * ("90a" in self.archs)

    def libraries(self) -> list[str]:
        places = [self.home / name for name in ("lib64", "targets/x86_64-linux/lib", "lib")]
        place = next((p for p in places if (p / "libcudart_static.a").exists()), None)
        if place is None:
            raise SystemExit(f"psm_kernels: no libcudart_static.a below {self.home}")
        return [f"-L{place}", "-lcudart_static", "-lrt", "-ldl"]


def find_cuda() -> Cuda | None:
    if os.environ.get("PSM_CUDA", "0") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        where = f"{home}/bin" if home else "PATH"
        raise SystemExit(f"psm_kernels: PSM_CUDA=1, but there is no nvcc in {where}")
    # nvcc may be a link or a script: it says itself where the toolkit is.
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    here = re.search(r"_HERE_=(.*)", dry.stderr)
    if here is None:
        raise SystemExit(f"psm_kernels: {nvcc} --dryrun does not name its toolkit:\n{dry.stderr}")
    names = os.environ.get("PSM_CUDA_ARCHS", "80,86,89,90a,120")
    archs = tuple(arch for arch in re.split(r"[ ,;]+", names) if arch)
    wrong = [arch for arch in archs if not re.fullmatch(r"[1-9]\d+[af]?", arch)]
    if wrong or not archs:
        raise SystemExit(f"PSM_CUDA_ARCHS: got {names!r}, wanted numbers such as 80,90a")
    return Cuda(Path(here[1].strip()).resolve().parent, archs)


def common_flags() -> list[str]:
    import pybind11

    version = re.search(r'__version__ = "(.*)"', (ROOT / "psm_kernels/__init__.py").read_text())[1]
    source_id = runpy.run_path(str(ROOT / "psm_kernels/_csrc.py"))["source_id"]
    includes = (sysconfig.get_path("include"), pybind11.get_include())
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"]
    flags += ["-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"]
    flags += [f'-DPSM_SOURCE_ID="{source_id(ROOT / "psm_kernels", version)}"', f"-DPSM_X86={X86:d}"]
    return flags + sanitizer_flags() + [f"-I{path}" for path in includes]


def sanitizer_flags() -> list[str]:
    names = os.environ.get("PSM_SANITIZE")
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1"]


def run_parallel(objects: dict[Path, list[str]], build: Path) -> None:
    """Compiles each object with its command, with ninja where it can be imported."""
    try:
        import ninja
    except ImportError:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True), objects.values()))
        return
    lines = ["rule cxx", "  command = $run -MD -MF $out.d", "  depfile = $out.d", "  deps = gcc"]
    for path, command in objects.items():
        run = shlex.join(command).replace("$", "$$")
        lines += [f"build {path.name}: cxx", f"  run = {run}"]
    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "--quiet", "-C", str(build)], check=True)


class BuildKernels(build_ext):
    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        reason = package / "psm_kernels/_build_info.py"
        reason.unlink(missing_ok=True)
        if find_compiler() is None:
            wanted = os.environ.get("CXX", "g++ or clang++")
            text = f"built without a C++ compiler ({wanted} not found)"
            print(f"psm_kernels: {text}; the cpp backend will not be available", file=sys.stderr)
            reason.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(f'"""Written by setup.py."""\n\nMISSING = {text!r}\n')
            self.extensions = []
        super().run()

    def build_extension(self, extension: Extension) -> None:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler, flags = find_compiler(), common_flags()
        cuda, libraries = find_cuda(), []
        objects = {}
        if cuda is not None:  # the longest jobs go first
            nvcc = [str(cuda.home / "bin/nvcc"), "-ccbin", compiler, "-std=c++17", "-O3"]
            nvcc += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
            for source in cuda.sources():
                command = [*nvcc, *cuda.flags(source), "-c", str(ROOT / source), "-o"]
                objects[build / f"cuda_{source.stem}.o"] = command
            flags += ["-DPSM_CUDA", *cuda.defines()]
            command = [compiler, *flags, "-c", str(ROOT / CUDA / "bindings.cpp"), "-o"]
            objects[build / "cuda_bindings.o"] = command
            libraries = cuda.libraries()
        for source, own in SOURCES.items():
            command = [compiler, *flags, *own, "-c", str(ROOT / source), "-o"]
            objects[build / f"{source.stem}.o"] = command
        for path, command in objects.items():
            command.append(str(path))
        run_parallel(objects, build)
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
        shared = shared if sys.platform == "darwin" else ["-shared"]
        link = [compiler, *shared, "-pthread", *sanitizer_flags(), *map(str, objects)]
        subprocess.run([*link, *libraries, "-o", str(target)], check=True)


setup(
    ext_modules=[Extension("psm_kernels._C", [str(source) for source in SOURCES])],
    cmdclass={"build_ext": BuildKernels},
)
