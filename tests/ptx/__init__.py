"""Runs PTX on the CPU, an instruction at a time: what nvcc made of csrc/cuda, where no GPU is.

    text.py          PTX -> kernels, statements, registers
    instructions.py  a statement -> a function of numpy arrays
    machine.py       threads, memory, barriers, asynchronous work
    runtime.py       the shipped module, with cudart.cpp in place of NVIDIA's runtime

Source: NVIDIA, PTX ISA 9.0. It knows the instructions of csrc/cuda, and says so of all others.
"""
