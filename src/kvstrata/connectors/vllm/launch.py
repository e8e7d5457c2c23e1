"""The JSON that makes vLLM use kvstrata. Knows vLLM's words, imports nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvstrata.config import Config

MODULE = "kvstrata.connectors.vllm"


def kv_transfer_config(config: Config, config_file: Path, *, cpu: bool) -> dict[str, Any]:
    """Value of --kv-transfer-config. cpu: for a vLLM without a GPU, with the spec that kvstrata brings."""
    extra: dict[str, Any] = (
        {"spec_name": "KVStrataCPUSpec", "spec_module_path": MODULE}
        if cpu
        else {"spec_name": "TieringOffloadingSpec"}
    )
    extra |= {
        "cpu_bytes_to_use": config.vllm.host_memory_bytes,
        "blocks_per_chunk": config.vllm.blocks_per_chunk,
        "secondary_tiers": [
            {
                "type": "KVStrataTier",
                "module_path": MODULE,
                "config_file": str(config_file.expanduser().absolute()),
            }
        ],
    }
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
