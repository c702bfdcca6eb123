"""Measurements. `pytest benchmarks/` times everything in turns and ends in a table."""
