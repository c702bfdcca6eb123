"""Measurements; all of them compare in one process, in turns, and say what they skip.

    pytest benchmarks/                          every operation against its competitors: a table
    pytest benchmarks/ --sweep all              one variable at a time: K, B, D, k, kinds of banks
    pytest benchmarks/ --store                  keep what is measured in benchmarks/results
    python -m benchmarks.report                 kept results as markdown, pictures next to them
    python -m benchmarks.report --readme        README.md and benchmarks/README.md from the same
    python -m benchmarks.guard                  has anything become slower? for CI

cases.py says what is measured, providers.py and peers.py by whom, eager.py and slab.py are the
baselines, measure.py has the clocks and machine.py what the machine is and can; batches.py is about
losses without a bank, mining.py about files of embeddings, digits_experiments.py compares methods,
scaling.py is about many processes, gpu.py and sass.py are about kernels.
"""
