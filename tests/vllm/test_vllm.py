"""Real vLLM on the CPU with kvstrata under it: restart, damage, wrong model, errors, hangs, the server."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstrata.traces.capture_merge import merge_captures
from kvstrata.traces.parquet import ParquetTrace

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make setup does it)"
    ),
]

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
KVSTRATA = str(Path(sys.executable).with_name("kvstrata"))
PROMPT_LENGTHS = (700, 500, 321, 64)
SHARED_TOKENS = 256
REPLY_TOKENS = 16

TOML = """\
[store]
io_deadline_seconds = {deadline}
breaker_retry_seconds = 0.5
breaker_failures = 2
capture = "{path}-capture"

[vllm]
host_memory_bytes = "16MiB"
blocks_per_chunk = 2

[[tier]]
type = "nvme"
path = "{path}"
capacity_bytes = "32MiB"
segment_bytes = "1MiB"
"""

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(REPOSITORY / "examples"),
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def run(name: str, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Run one scenario in a process of its own."""
    job, result = folder / f"{name}.job.json", folder / f"{name}.result.json"
    job.write_text(json.dumps(arguments))
    process = subprocess.run(
        [sys.executable, str(HERE / "engine_process.py"), name, str(job), str(result)],
        env=ENVIRONMENT | {"VLLM_CACHE_ROOT": str(folder / "vllm-cache")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    return dict(json.loads(result.read_text()))


def write_toml(folder: Path, nvme: Path, deadline: float = 5.0) -> Path:
    path = folder / f"{nvme.name}.toml"
    path.write_text(TOML.format(path=nvme, deadline=deadline))
    return path


def make_model(folder: Path, seed: int) -> Path:
    code = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from tiny_llama import TEST, make_model\n"
        f"make_model(Path({str(folder)!r}), replace(TEST, seed={seed}), Path('LICENSE').read_text())\n"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=REPOSITORY, check=True)
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Token ids; the first 256 are the same in all, as a system prompt is."""
    rng = np.random.default_rng(7)
    shared = rng.integers(10, 500, SHARED_TOKENS).tolist()
    return [(shared + rng.integers(10, 500, 2048).tolist())[:length] for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "a", seed=0)


@pytest.fixture(scope="module")
def filled(
    tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: list[list[int]]
) -> dict[str, Any]:
    """A folder that one engine filled and closed, and the replies of plain vLLM."""
    folder = tmp_path_factory.mktemp("filled")
    toml = write_toml(folder, folder / "nvme")
    result = run("both", folder, model=str(model), toml=str(toml), prompts=prompts)
    return result | {"folder": folder, "toml": toml}


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Tokens equal, log probabilities equal but for the rounding of another batch shape."""
    for ours, theirs in zip(got["answers"], expected["answers"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        np.testing.assert_allclose(ours["logprobs"], theirs["logprobs"], rtol=0, atol=1e-4)


def copy_of(filled: dict[str, Any], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the filled folder, and a TOML for it."""
    subprocess.run(["cp", "-a", str(filled["folder"] / "nvme"), str(tmp_path / "nvme")], check=True)
    return tmp_path / "nvme", write_toml(tmp_path, tmp_path / "nvme")


def test_first_engine_saves_every_full_chunk_and_equals_plain_vllm(
    filled: dict[str, Any], prompts: list[list[int]]
) -> None:
    assert_same(filled["filled"], filled["plain"])
    chunk = filled["filled"]["chunk_tokens"]
    chains = {
        tuple(prompt[: end * chunk]) for prompt in prompts for end in range(1, len(prompt) // chunk + 1)
    }
    assert filled["filled"]["blocks"] == len(chains)
    assert filled["filled"]["pinned"] == 0


def test_the_capture_of_an_engine_holds_each_request_once(
    filled: dict[str, Any], prompts: list[list[int]]
) -> None:
    """Each prompt's whole chunks, in the order of asking; then what the reply added, if a chunk."""
    merged = merge_captures([filled["folder"] / "nvme-capture"], filled["folder"] / "captured.parquet")
    assert merged.skipped == [] and merged.requests == len(prompts)
    chunk = filled["filled"]["chunk_tokens"]
    numbers: dict[tuple[int, ...], int] = {}
    for batch in ParquetTrace(filled["folder"] / "captured.parquet").batches():
        for number in range(batch.requests):
            prompt = prompts[batch.first_request + number]
            ids = batch.ids[batch.starts[number] : batch.starts[number + 1]].tolist()
            prefixes = [tuple(prompt[: end * chunk]) for end in range(1, len(prompt) // chunk + 1)]
            assert ids[: len(prefixes)] == [numbers.setdefault(p, len(numbers)) for p in prefixes]
            grown = (len(prompt) + REPLY_TOKENS) // chunk
            assert len(prefixes) <= len(ids) <= grown
            for block in ids[len(prefixes) :]:
                assert numbers.setdefault((-1, block), len(numbers)) == block, "a chunk of a reply is new"


def test_restart_serves_every_full_chunk_with_equal_tokens_and_logprobs(
    filled: dict[str, Any], model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    _, toml = copy_of(filled, tmp_path)
    got = run("served", tmp_path, model=str(model), toml=str(toml), prompts=prompts)
    assert_same(got, filled["plain"])
    chunk = got["chunk_tokens"]
    assert got["loaded_chunks"] == [len(prompt) // chunk for prompt in prompts]
    for prompt, answer in zip(prompts, got["answers"], strict=True):
        assert answer["cached_tokens"] >= (len(prompt) - 1) // chunk * chunk
    assert got["misses"] == {} and got["dropped"] == {}


def test_another_model_on_the_folder_sees_nothing_and_spoils_nothing(
    filled: dict[str, Any], model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    _, toml = copy_of(filled, tmp_path)
    other = make_model(tmp_path / "b", seed=1)
    got = run("both", tmp_path, model=str(other), toml=str(toml), prompts=prompts)
    assert_same(got["filled"], got["plain"])
    assert got["plain"]["answers"][0]["tokens"] != filled["plain"]["answers"][0]["tokens"]
    # Within its own run each prompt finds what an earlier one shared, and nothing of the other model.
    shared = SHARED_TOKENS // got["filled"]["chunk_tokens"]
    own = [0, shared, shared, min(shared, PROMPT_LENGTHS[3] // got["filled"]["chunk_tokens"])]
    assert got["filled"]["loaded_chunks"] == own
    again = run("served", tmp_path, model=str(model), toml=str(toml), prompts=prompts)
    assert_same(again, filled["plain"])
    assert sum(again["loaded_chunks"]) > 0


def test_damage_of_every_kind_is_a_counted_miss_with_the_right_reply(
    filled: dict[str, Any], model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    folder, toml = copy_of(filled, tmp_path)
    results = run(
        "damage", tmp_path, model=str(model), toml=str(toml), pristine=str(folder), prompts=prompts
    )
    control = results.pop("control")
    assert set(results) == {
        "zeroed", "flipped_payload", "flipped_header", "truncated", "swapped", "missing_segment",
    }  # fmt: skip
    for kind, got in results.items():
        assert_same(got, filled["plain"])
        assert sum(got["misses"].values()) + sum(got["dropped"].values()) > 0, kind
        assert got["pinned"] == 0
        # What was computed again was saved again.
        assert got["blocks"] >= filled["filled"]["blocks"], kind
    wrong = [
        not np.allclose(ours["logprobs"], theirs["logprobs"], rtol=0, atol=1e-4)
        for ours, theirs in zip(control["answers"], filled["plain"]["answers"], strict=True)
    ]
    assert any(wrong), "zeroed bytes without a check went unseen: this test proves nothing"


def test_errors_and_hangs_of_the_disk_are_misses_and_the_tier_comes_back(
    filled: dict[str, Any], model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    toml = write_toml(tmp_path, tmp_path / "nvme", deadline=1.0)
    others = [prompt[::-1] for prompt in prompts]
    got = run("misbehaving", tmp_path, model=str(model), toml=str(toml), prompts=prompts, others=others)
    for scene in ("filled", "broken", "healed", "back"):
        assert_same(got[scene], filled["plain"])
    assert_same(got["hung"], filled["plain"])
    assert sum(count for miss, count in got["broken"]["misses"].items() if "io_error" in miss) > 0
    assert sum(got["broken"]["loaded_chunks"]) == 0
    assert "nvme read unavailable" in got["broken"]["events"]
    assert sum(got["healed"]["loaded_chunks"]) > 0
    assert got["hung"]["reads_that_hung"] > 0 and not got["hung"]["readable"]
    assert got["hung"]["quarantined"] > 0
    assert sum(got["back"]["loaded_chunks"]) > 0 and got["back"]["pinned"] == 0
    reversed_plain = run("both", tmp_path, model=str(model), toml=str(toml), prompts=others)["plain"]
    assert_same(got["while_hung"], reversed_plain)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """vLLM's OpenAI server, started as a user starts it."""

    def __init__(self, model: Path, toml: Path, folder: Path) -> None:
        transfer = subprocess.run(
            [KVSTRATA, "vllm-config", "--config", str(toml), "--cpu"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        # A name of our own for the engine, so that what it leaves in /dev/shm can be told and removed.
        self.engine_id = f"kvstrata-{uuid.uuid4().hex}"
        transfer = json.dumps(json.loads(transfer) | {"engine_id": self.engine_id})
        self.port = free_port()
        self.log = (folder / "server.log").open("a+")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
                "--dtype", "float32", "--block-size", "32", "--enforce-eager", "--max-model-len", "2048",
                "--kv-cache-memory-bytes", str(64 << 20), "--prefix-caching-hash-algo", "sha256_cbor",
                "--enable-prompt-tokens-details", "--port", str(self.port), "--host", "127.0.0.1",
                "--kv-transfer-config", transfer,
            ],
            env=ENVIRONMENT | {"VLLM_CACHE_ROOT": str(folder / "vllm-cache")},
            stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def wait_ready(self) -> None:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).close()
                return
            except OSError:
                alive = self.process.poll() is None and time.monotonic() < until
                if not alive:
                    self.log.seek(0)
                    raise AssertionError(self.log.read()[-6000:]) from None
                time.sleep(0.3)

    def complete(self, model: Path, prompt: list[int]) -> dict[str, Any]:
        body = {
            "model": str(model),
            "prompt": prompt,
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return dict(json.load(reply))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()
        for left in Path("/dev/shm").glob(f"vllm_offload_{self.engine_id}*"):
            left.unlink()


def test_the_server_gets_its_prefix_back_after_a_restart(
    model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    port = free_port()
    toml = write_toml(tmp_path, tmp_path / "nvme")
    toml.write_text(f"[metrics]\nport = {port}\n\n{toml.read_text()}")
    replies = []
    for _ in range(2):
        server = Server(model, toml, tmp_path)
        try:
            server.wait_ready()
            replies.append(server.complete(model, prompts[0]))
            stats = subprocess.run(
                [KVSTRATA, "stats", "--config", str(toml), "--json"],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            assert json.loads(stats)
        finally:
            server.stop()
    first, second = replies
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert not (first["usage"]["prompt_tokens_details"] or {}).get("cached_tokens")
    chunk = 64
    expected = (len(prompts[0]) - 1) // chunk * chunk
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= expected
