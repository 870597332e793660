"""Benchmarks: one file each, a table of tasks. The folder is the list; see `_contract.py`."""
