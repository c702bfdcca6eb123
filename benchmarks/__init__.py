"""Measurements; all of them compare in one process, in turns, and say what they skip.

    pytest benchmarks/                          every operation against its competitors: a table
    pytest benchmarks/ --sweep all              one variable at a time: K, B, D, k, kinds of banks
    pytest benchmarks/ --results benchmarks/results/NAME.json    keep what is measured
    python -m benchmarks.report                 kept results as markdown, pictures next to them
    python -m benchmarks.report --readme        the README's tables from the same files
    python -m benchmarks.guard                  has anything become slower? for CI

cases.py says what is measured, providers.py by whom, eager.py and slab.py are the baselines;
digits_experiments.py compares methods, scaling.py is about many processes, gpu.py and sass.py are
about kernels.
"""
