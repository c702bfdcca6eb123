"""The cuda backend without a GPU: psm_kernels._C, linked with cudart.cpp in place of NVIDIA's
runtime, starts its kernels in machine.py."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

import psm_kernels
from psm_kernels.backends import compiled, cuda
from ptx.machine import Machine
from ptx.text import Fault, Kernel, read

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build/objects"  # what the build of a checkout leaves
FAKE = Path(__file__).with_name("cudart.cpp")
NVCC = shutil.which("nvcc")


def unavailable() -> str | None:
    if cuda.built_for() is None or NVCC is None:
        return "needs nvcc and a build of the checkout with it"
    return None if (OBJECTS / "cuda_launch.o").exists() else f"{OBJECTS} has no cuda_launch.o"


def built(name: str, sources: list[Path], command) -> Path:
    """The file that `command(path)` makes, kept in the temporary directory while sources last."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in [Path(__file__), *sources]))
    folder = Path(tempfile.gettempdir()) / f"psm_ptx_{os.getuid()}_{digest.hexdigest()[:16]}"
    if not (folder / name).exists():
        folder.mkdir(exist_ok=True)
        part = folder / f"{os.getpid()}_{name}"
        subprocess.run([*command, "-o", part], check=True)
        part.rename(folder / name)
    return folder / name


@functools.cache
def library() -> Path:
    objects = sorted(OBJECTS.glob("*.o"))
    command = [NVCC, "-std=c++17", "-shared", "-cudart=none", "-Xcompiler=-fPIC,-pthread"]
    command += ["-Xcompiler=-fvisibility=hidden", "-Xlinker=-Bsymbolic", FAKE, *objects]
    return built("_C" + sysconfig.get_config_var("EXT_SUFFIX"), [FAKE, *objects], command)


@functools.cache
def module() -> ModuleType:
    # Another name than that of the module with NVIDIA's runtime, which pybind11 would give again
    spec = importlib.util.spec_from_file_location("psm_ptx._C", library())
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    assert loaded.source_id == psm_kernels._C.source_id, f"{OBJECTS} is of other sources"
    return loaded


def ptx(source: Path, *options: str) -> str:
    arch = {"sm90": "90a", "host": "90", "sm80": "80"}[source.parent.name]
    command = [NVCC, "-std=c++17", "-O3", "-DPSM_CUDA_SM90A", f"-arch=compute_{arch}", "-ptx"]
    sources = [source, *sorted((ROOT / "csrc").glob("**/*.*h"))]
    name = "".join([source.stem, *options, ".ptx"])
    return built(name, sources, [*command, *options, source]).read_text()


def plain(name: str) -> str:
    """A mangled name without the numbers that change with the file's path."""
    return re.sub(r"_GLOBAL__N__[0-9a-f]{8}_(\w+?_cu_)[0-9a-f]{8}", r"\1", name)


@functools.cache
def texts() -> dict[str, str]:
    """PTX by source file, with the front end's architecture of setup.py."""
    with ThreadPoolExecutor() as pool:
        sources = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
        return dict(zip((s.stem for s in sources), pool.map(ptx, sources), strict=True))


@functools.cache
def kernels() -> dict[str, Callable[[], Kernel]]:
    return {plain(k): v for text in texts().values() for k, v in read(text).items()}


MACHINES: dict[tuple, Machine] = {}  # each takes up to a second to make


class Gpu:
    """A device whose launches run in a Machine."""

    def __init__(self, monkeypatch):
        self.capability, self.multiprocessors, self.early = 9, 3, False
        self.block_kilobytes: int | None = None  # of shared memory; else what the chip has
        self.warps = 4  # that go in step
        self.runs = True  # or only notes the arguments
        self.trapped: torch.Tensor | None = None  # (4,) int32, where a debug build tells of traps
        self.replaced: dict[str, Callable[[], Kernel]] = {}  # by plain name
        self.tensors: list[weakref.ref] = []  # whose addresses kernels were given
        self.launches: list[str] = []
        self.grids: list[int] = []
        self.followers: list[bool] = []  # launches that may start before the one ahead has ended
        number, text, size = ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t
        kinds = (text, number, number, size, ctypes.POINTER(ctypes.c_void_p), number)
        self.callback = ctypes.CFUNCTYPE(ctypes.c_void_p, *kinds)(self.launch)
        monkeypatch.setattr(psm_kernels, "_C", module())
        # Cached structs are of this module's classes
        for name in ("pass_struct", "_bank_struct", "_mining_struct", "_affine_struct"):
            cached = getattr(compiled, name)
            monkeypatch.setattr(compiled, name, functools.cache(cached.__wrapped__))
        monkeypatch.setattr(cuda, "_place", self.place)
        address = torch.Tensor.data_ptr

        def data_ptr(tensor):
            self.tensors.append(weakref.ref(tensor))
            return address(tensor)

        monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)
        self.address = address

    def place(self, bank) -> dict[str, int]:
        runtime = ctypes.CDLL(str(library()))
        kilobytes = self.block_kilobytes or (227 if self.capability == 9 else 99)
        device = self.capability, self.multiprocessors, kilobytes << 10
        runtime.fake_device(self.callback, *device)
        runtime.fake_loading(True)
        reason = module().cuda.unavailable(0)  # as when the backend is chosen
        runtime.fake_loading(False)
        if reason:
            raise RuntimeError(reason)
        return {"device": 0, "stream": 0}

    def launch(self, name, grid, threads, shared_bytes, arguments, early) -> int | None:
        """Null, or what went wrong."""
        try:
            machine = self.machine(plain(name.decode()))
            if early and not machine.kernel.waits_first():
                raise Fault("starts early, and does not wait before it touches memory")
            alive = [tensor for ref in self.tensors if (tensor := ref()) is not None]
            self.tensors = [weakref.ref(tensor) for tensor in alive]
            regions = [(at := self.address(t), at + t.nbytes) for t in alive if t.nbytes]
            places = [(arguments[i], n) for i, n in enumerate(machine.kernel.params.values())]
            self.values = [ctypes.string_at(place, size) for place, size in places]
            if (
                self.trapped is not None and "sm90" in machine.kernel.name
            ):  # the last field of KernelArgs, null where no one asks
                at = self.address(self.trapped).to_bytes(8, "little")
                self.values[0] = self.values[0][:-8] + at
                regions.append((self.address(self.trapped), self.address(self.trapped) + 16))
            if self.runs:
                machine.launch(grid, threads, shared_bytes, self.values, regions)
        except Exception as error:
            kind = "" if isinstance(error, Fault) else f"{type(error).__name__}: "
            self.message = ctypes.create_string_buffer(f"{kind}{error}".encode())
            return ctypes.addressof(self.message)
        self.launches.append(machine.kernel.name)
        self.grids.append(grid)
        self.followers.append(bool(early))
        return None

    def machine(self, name: str) -> Machine:
        how = {"early": self.early, "warps": self.warps}
        if name in self.replaced:
            return Machine(self.replaced[name](), **how)
        key = name, *how.values()
        if key not in MACHINES:
            MACHINES[key] = Machine(kernels()[name](), **how)
        return MACHINES[key]
