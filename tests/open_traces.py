"""Where the real traces lie: beside the repository, if at all. Tests that need them skip without them."""

from __future__ import annotations

from pathlib import Path

OPEN = Path(__file__).parents[2] / "shared" / "traces" / "open"
CONVERSATION = OPEN / "mooncake" / "conversation_trace.jsonl.gz"
AGENTIC = OPEN / "agentic"
