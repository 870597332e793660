"""Merging methods: one file each. The folder is the list; see `_contract.py` for what a file may ask for."""
