"""Checks in a virtual machine, outside of the ordinary tests: what this machine's own kernel cannot do."""
