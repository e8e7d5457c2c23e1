"""Which peers there are, by the name that the results use, and the process in which one runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from peers.base import Peer


@dataclass(frozen=True)
class Variant:
    """file, kind: where its class is. options: what it is made with. needs: modules that must be there.

    slow: so far behind that it takes part in the cells of 1 and 4 MiB alone.
    """

    file: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    slow: bool = False

    def load(self) -> type[Peer]:
        """Its class. Raises ImportError for a package that is missing."""
        for name in self.needs:
            importlib.import_module(name)
        found: type[Peer] = getattr(importlib.import_module(f"peers.{self.file}"), self.kind)
        return found

    def packages(self) -> tuple[str, ...]:
        """Distributions behind it, without importing them."""
        found: tuple[str, ...] = getattr(importlib.import_module(f"peers.{self.file}"), self.kind).PACKAGES
        return found


OURS = "kvstrata"
FIO, FIO_SMALL, FIO_BUSY = "fio", "fio, 4 KiB pages", "fio beside a spinning process"
_LMCACHE = ("torch", "lmcache.lmcache_native", "lmcache.v1.distributed.l2_adapters")

VARIANTS: dict[str, Variant] = {
    OURS: Variant("kvstrata_store", "KvstrataStore"),
    "NIXL io_uring": Variant("nixl", "Nixl", {"engine": "uring"}, ("nixl_cu12",)),
    "NIXL AIO": Variant("nixl", "Nixl", {"engine": "aio"}, ("nixl_cu12",)),
    "LMCache raw_block": Variant(
        "lmcache_l2",
        "LmcacheL2",
        {"adapter": "raw_block", "io_engine": "io_uring", "num_store_workers": 4, "num_load_workers": 4},
        (*_LMCACHE, "lmcache_rust_raw_block_io"),
    ),
    "LMCache fs_native": Variant(
        "lmcache_l2",
        "LmcacheL2",
        {"adapter": "fs_native", "use_odirect": True, "num_workers": 8},
        (*_LMCACHE, "lmcache.lmcache_fs"),
    ),
    "LMCache fs": Variant(
        "lmcache_l2", "LmcacheL2", {"adapter": "fs", "use_odirect": True}, (*_LMCACHE, "aiofiles")
    ),
    "LMCache local disk": Variant(
        "lmcache_disk", "LmcacheDisk", {}, (*_LMCACHE, "lmcache.v1.storage_backend.local_disk_backend")
    ),
    "files O_DIRECT": Variant("files", "Files", {"direct": True, "threads": 8}),
    "files buffered": Variant("files", "Files", {"direct": False, "threads": 8}),
    "files one thread": Variant("files", "Files", {"direct": False, "threads": 1}, slow=True),
    "diskcache": Variant("disk_cache", "DiskCache", {}, ("diskcache",), slow=True),
}
"""Of the folder's cells."""

NO_PRIORITY = "kvstrata, no priority"
UNHURRIED = Variant("kvstrata_store", "KvstrataStore", {"priority": False})
"""Ours with the priority of loads switched off: shown beside it where a load waits behind stores."""

COPY = "numpy copy"
MEMORY_VARIANTS: dict[str, Variant] = {
    OURS: Variant("kvstrata_store", "KvstrataStore", {"tier": "memory"}),
    COPY: Variant("copying", "NumpyCopy"),
    "Mooncake": Variant("mooncake", "Mooncake", {}, ("mooncake.store",)),
}
"""Of the memory tier's cells."""
