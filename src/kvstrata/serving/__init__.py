"""Several processes of one machine on one store: `StoreServer` owns it, `RemoteStore` is a client's end."""

from __future__ import annotations

from kvstrata.serving.client import RemoteStore
from kvstrata.serving.opening import open_store
from kvstrata.serving.server import StoreServer

__all__ = ["RemoteStore", "StoreServer", "open_store"]
