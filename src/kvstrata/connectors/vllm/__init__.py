"""vLLM: name `KVStrataTier` (and, without a GPU, `KVStrataCPUSpec`) in --kv-transfer-config.

`kvstrata vllm-config` prints the JSON. Nothing of vLLM is imported before vLLM asks for one of the names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstrata.connectors.vllm.cpu_spec import KVStrataCPUSpec
    from kvstrata.connectors.vllm.tier import KVStrataTier

__all__ = ["KVStrataCPUSpec", "KVStrataTier"]

_HOME = {"KVStrataCPUSpec": "cpu_spec", "KVStrataTier": "tier"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
