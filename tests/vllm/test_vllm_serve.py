"""Two real vLLM engines on one `kvstrata serve`: what the first computed, the second is served."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstrata.config import parse_config

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make setup does it)"
    ),
]

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
MAIN = "from kvstrata.cli.app import main; main()"
CHUNK = 64
LENGTHS = (700, 321)

TOML = """\
[serve]
socket = "{folder}/socket"
connect = "{folder}/socket"
call_seconds = 30.0
reconnect_seconds = 0.2

[vllm]
host_memory_bytes = "16MiB"
blocks_per_chunk = 2

[[tier]]
type = "nvme"
path = "{folder}/nvme"
capacity_bytes = "32MiB"
segment_bytes = "1MiB"
"""

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        [str(REPOSITORY / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

ENGINE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import kvstrata.policies
from inprocess import ask, engine, store_of
model, toml, prompts, result = sys.argv[1:]
with engine(Path(model), Path(toml), kv_bytes=64 << 20, context=2048) as llm:
    store = store_of(llm)
    answers = []
    for prompt in json.loads(prompts):
        llm.reset_prefix_cache(reset_connector=True)
        answers.append(asdict(ask(llm, prompt)))
    llm.reset_prefix_cache(reset_connector=True)
    count = store.telemetry.value
    Path(result).write_text(json.dumps({
        "answers": answers,
        "store": type(store).__name__,
        "loaded": count("blocks_total", "load", "served", "loaded"),
        "saved": count("blocks_total", "save", "served", "saved"),
        "missed": count("misses_total"),
        "copied_bytes": count("serve_staged_bytes_total"),
        "pinned": [tier.pinned_blocks for tier in store.status()],
    }))
"""


def run_engine(folder: Path, name: str, prompts: list[list[int]]) -> dict[str, Any]:
    result = folder / f"{name}.json"
    process = subprocess.run(
        [
            sys.executable, "-c", ENGINE, str(folder / "model"), str(folder / "kvstrata.toml"),
            json.dumps(prompts), str(result),
        ],
        env=ENVIRONMENT | {"VLLM_CACHE_ROOT": str(folder / "vllm-cache")},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    return dict(json.loads(result.read_text()))


def test_replicas_share_a_server_and_have_ports_of_their_own() -> None:
    from kvstrata.connectors.vllm.tier import _for_replica

    config = parse_config({"serve": {"connect": "/run/socket"}, "metrics": {"port": 9000}})
    second = _for_replica(config, SimpleNamespace(data_parallel_size=4, data_parallel_index=2))
    assert second == replace(config, metrics=replace(config.metrics, port=9002))


def test_a_second_engine_is_served_what_the_first_one_computed(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom dataclasses import replace\n"
        "from tiny_llama import TEST, make_model\n"
        "import sys\n"
        "make_model(Path(sys.argv[1]), replace(TEST, seed=0), Path('LICENSE').read_text())\n"
    )
    make = [sys.executable, "-c", code, str(tmp_path / "model")]
    subprocess.run(make, env=ENVIRONMENT, cwd=REPOSITORY, check=True)
    toml = tmp_path / "kvstrata.toml"
    toml.write_text(TOML.format(folder=tmp_path))
    prompts = [np.random.default_rng(n).integers(10, 500, n).tolist() for n in LENGTHS]
    server = subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", str(toml)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None and server.stdout.readline().startswith("serving ")
        first = run_engine(tmp_path, "first", prompts)
        second = run_engine(tmp_path, "second", prompts)
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0
    chunks = sum(length // CHUNK for length in LENGTHS)
    assert first["store"] == second["store"] == "RemoteStore"
    assert (first["saved"], first["loaded"]) == (chunks, 0)
    assert second["loaded"] == chunks and second["missed"] == 0
    assert first["copied_bytes"] == second["copied_bytes"] == 0, "vLLM's memory is moved in place"
    assert first["pinned"] == second["pinned"] == [0]
    for ours, theirs in zip(second["answers"], first["answers"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        np.testing.assert_allclose(ours["logprobs"], theirs["logprobs"], rtol=0, atol=1e-4)
    for length, answer in zip(LENGTHS, second["answers"], strict=True):
        assert answer["cached_tokens"] >= (length - 1) // CHUNK * CHUNK
