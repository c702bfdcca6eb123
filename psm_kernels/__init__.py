"""Contrastive losses with memory banks at the cost of one bank read."""

__version__ = "0.1.0"
