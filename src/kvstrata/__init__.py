"""KV-cache storage for LLM servers. The names below load on first use: importing kvstrata is light."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstrata.config import Config, load_config
    from kvstrata.errors import (
        BlockCorruptError,
        ConfigError,
        FolderLockedError,
        FormatVersionError,
        KVStrataError,
        LayoutMismatchError,
        StoreClosedError,
        TierError,
        TierUnavailableError,
    )
    from kvstrata.hashing import chain_keys, namespace_digest, wrap_keys
    from kvstrata.store import BlockStore
    from kvstrata.transfer.buffers import Region
    from kvstrata.types import BlockKey, BlockLayout, Lookup, Namespace, Outcome, PrefixMatch

__version__ = "0.1.0"

__all__ = [
    "BlockCorruptError",
    "BlockKey",
    "BlockLayout",
    "BlockStore",
    "Config",
    "ConfigError",
    "FolderLockedError",
    "FormatVersionError",
    "KVStrataError",
    "LayoutMismatchError",
    "Lookup",
    "Namespace",
    "Outcome",
    "PrefixMatch",
    "Region",
    "StoreClosedError",
    "TierError",
    "TierUnavailableError",
    "chain_keys",
    "load_config",
    "namespace_digest",
    "wrap_keys",
]

_HOME = {
    "BlockStore": "store",
    "Config": "config",
    "load_config": "config",
    "chain_keys": "hashing",
    "namespace_digest": "hashing",
    "wrap_keys": "hashing",
    "BlockKey": "types",
    "BlockLayout": "types",
    "Lookup": "types",
    "Namespace": "types",
    "Outcome": "types",
    "PrefixMatch": "types",
    "Region": "transfer.buffers",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kvstrata' has no attribute {name!r}")
    return getattr(import_module(f"kvstrata.{_HOME.get(name, 'errors')}"), name)
