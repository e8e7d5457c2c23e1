"""Hand-made conversations."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any


def turn(t: float, ids: list[int], **fields: Any) -> dict[str, Any]:
    return {
        "t": t, "type": "n", "model": "big", "in": 64 * len(ids) + 5, "out": 9, "hash_ids": ids,
        "stop": "tool_use", "api_time": 1.5, **fields,
    }  # fmt: skip


def conversation(requests: list[Any], tool: int = 128, system: int = 72, **fields: Any) -> dict[str, Any]:
    return {
        "id": "c", "block_size": 64, "hash_id_scope": "local", "tool_tokens": tool, "system_tokens": system,
        "requests": requests, **fields,
    }  # fmt: skip


def agent(t: float, requests: list[Any], tool: int = 64, system: int = 64) -> dict[str, Any]:
    return {"t": t, "type": "subagent", "tool_tokens": tool, "system_tokens": system, "requests": requests}


def write(path: Path, content: object) -> Path:
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path
