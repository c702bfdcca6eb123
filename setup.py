"""Builds psm_kernels._C with setuptools, pybind11 and ninja; metadata is in pyproject.toml.

The module includes no torch header and links no torch library, so one build serves every torch.
Environment: CXX names the compiler; PSM_SANITIZE=address,undefined makes an instrumented build.
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

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = Path("csrc/cpu")

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi"]
AVX512 = [*AVX2, *(f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", "vnni"))]
SOURCES = {  # source -> flags of its own: nothing else may be compiled for more than the baseline
    Path("csrc/bindings.cpp"): [],
    CPU / "bank_pass.cpp": [],
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
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]


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
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", str(build)], check=True)


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
        objects = {
            build / f"{source.stem}.o": [compiler, *flags, *own, "-c", str(ROOT / source), "-o"]
            for source, own in SOURCES.items()
        }
        for path, command in objects.items():
            command.append(str(path))
        run_parallel(objects, build)
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
        shared = shared if sys.platform == "darwin" else ["-shared"]
        link = [compiler, *shared, "-pthread", *sanitizer_flags(), *map(str, objects)]
        subprocess.run([*link, "-o", str(target)], check=True)


setup(
    ext_modules=[Extension("psm_kernels._C", [str(source) for source in SOURCES])],
    cmdclass={"build_ext": BuildKernels},
)
