"""Eldric: language models larger than any one machine, on the machines you already have."""

__version__ = "0.1.0"

#: Version of the messages and frames that nodes exchange. Nodes of different versions do not work together.
PROTOCOL = 2
