"""Triton's driver for a GPU that is not there: compiles, and runs the PTX in machine.py."""

from __future__ import annotations

import struct

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from psm_kernels.backends.triton import config
from ptx.machine import Machine
from ptx.text import read

FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}


class Driver:
    """The part of Triton's interface that compiling and launching asks for."""

    def __init__(self, capability: int, early: bool):
        self.capability, self.early = capability, early

    def get_current_device(self) -> int:  # Triton keeps what it compiles, and us, by device
        return self.capability + 1000 * self.early

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Launcher:
    def __init__(self, kernel: CompiledKernel, early: bool):
        (self.make,) = read(kernel.asm["ptx"]).values()
        self.early, self.kernel, self.machine = early, kernel, None

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        assert (y, z) == (1, 1)
        if self.machine is None:
            self.machine = Machine(self.make(), early=self.early)
        values, regions = [], []
        for kind, argument in zip(self.kernel.src.signature.values(), arguments, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(argument, TensorDescriptor):
                values += described(argument, self.kernel.metadata.tensordesc_meta)
                argument = argument.base
            elif not isinstance(argument, torch.Tensor):
                values.append(struct.pack(FORMATS[kind], argument))
            else:
                values.append(struct.pack("q", argument.data_ptr()))
            if isinstance(argument, torch.Tensor):
                regions.append((at := argument.data_ptr(), at + argument.nbytes))
        values += [bytes(8)] * (len(self.machine.kernel.params) - len(values))  # no scratch memory
        shared, warps = self.kernel.metadata.shared, self.kernel.metadata.num_warps
        self.machine.launch(x, 32 * warps, shared, values, regions)


def described(tensor: TensorDescriptor, meta: list[dict]) -> list[bytes]:
    """The tensor map as instructions.py reads it, sizes, strides."""
    (box,) = (m["block_size"] for m in meta)
    assert [m["swizzle"] for m in meta] == [3]  # 128 bytes
    rows, columns = tensor.shape
    size = tensor.base.element_size()
    plain = [tensor.base.data_ptr(), columns, rows, tensor.strides[0] * size, box[1], box[0], size]
    parts = [np.array(plain, np.uint64).tobytes().ljust(128, b"\0")]
    parts += [struct.pack("i", n) for n in tensor.shape]
    return parts + [struct.pack("q", n) for n in tensor.strides]


def install(monkeypatch, capability: int, early: bool = False) -> None:
    """Launches go to the machine until the test ends."""
    chip = "hopper" if capability == 90 else "cuda"
    monkeypatch.setattr(config, "chip", lambda device: chip)

    def start(kernel):
        kernel.module = kernel.function = kernel
        kernel._run = Launcher(kernel, early)

    monkeypatch.setattr(CompiledKernel, "_init_handles", start)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(capability, early))
