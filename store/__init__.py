"""The store: runs, what they measured and made, in one DuckDB file that never loses a row.

>>> store = open_store("lab/mergectl.duckdb")  # doctest: +SKIP
>>> with store.start("eval", config={"model": "merged"}, seed=0) as run:  # doctest: +SKIP
...     run.metric("score", 0.91, task="digits/parity", split="report")
>>> store.query("SELECT kind, status FROM runs").rows  # doctest: +SKIP
[('eval', 'finished')]
"""

from mergectl.store.documents import digest_of
from mergectl.store.errors import StoreBusyError, StoreError, StoreWarning
from mergectl.store.query import Table
from mergectl.store.run import Run
from mergectl.store.store import Store, open_store

__all__ = ["Run", "Store", "StoreBusyError", "StoreError", "StoreWarning", "Table", "digest_of", "open_store"]
