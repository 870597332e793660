"""What can go wrong with the store, in sentences for people."""

from __future__ import annotations


class StoreError(Exception):
    """The store cannot do what was asked: one or two sentences for the user."""


class StoreBusyError(StoreError):
    """Another process holds the store right now; trying again later helps."""


class StoreWarning(UserWarning):
    """Something in the lab was put aside; nothing that is stored was lost."""
