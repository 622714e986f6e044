"""Eldric: language models larger than any one machine, on the machines you already have."""

__version__ = "0.1.0"
