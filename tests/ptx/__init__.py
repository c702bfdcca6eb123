"""Runs PTX on the CPU, an instruction at a time: what nvcc and Triton make, where no GPU is.

    text.py           PTX -> kernels, statements, registers
    instructions.py   a statement -> a function of numpy arrays; with operands.py, arithmetic.py,
                      memory.py, products.py
    machine.py        threads, memory, barriers, asynchronous work
    runtime.py        the shipped module, with cudart.cpp in place of NVIDIA's runtime
    triton_driver.py  in place of Triton's driver

Source: NVIDIA, PTX ISA 9.0. It knows the instructions of these kernels, and says so of others.
"""
