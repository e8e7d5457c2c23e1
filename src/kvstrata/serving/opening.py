"""`open_store`: the store that a configuration means, here or in the process that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstrata.config import Config
from kvstrata.serving.client import RemoteStore
from kvstrata.store import BlockStore
from kvstrata.types import BlockLayout, Namespace


def open_store(
    config: Config, layout: BlockLayout, namespace: Namespace, *, memory: Sequence[Any] = ()
) -> BlockStore | RemoteStore:
    """A RemoteStore where `serve.connect` names a socket, else a BlockStore with tiers of this process.

    memory: what the engine's blocks will lie in, for a server to map. Raises ConfigError.
    """
    if config.serve.connect:
        return RemoteStore(config, layout, namespace, memory=memory)
    return BlockStore(config, layout, namespace)
