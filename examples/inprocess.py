"""A real vLLM engine in this process, with or without kvstrata under it. Used by the demo and the tests."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Small models gain nothing from torch.compile, which needs a C++ compiler and half a minute.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
}

from vllm import LLM, SamplingParams

from kvstrata.config import load_config
from kvstrata.connectors.vllm.launch import kv_transfer_config
from kvstrata.store import BlockStore

BLOCK_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """One reply. logprobs: of the chosen tokens. cached_tokens: not computed, from whatever cache."""

    tokens: list[int]
    logprobs: list[float]
    ttft_seconds: float
    cached_tokens: int


@contextlib.contextmanager
def engine(
    model: Path, kvstrata_toml: Path | None, *, kv_bytes: int = 256 << 20, context: int = 8192
) -> Iterator[LLM]:
    """An engine on the CPU, shut down at the end. Without a TOML: plain vLLM without any cache."""
    options: dict[str, Any] = {}
    engine_id = f"kvstrata-{uuid.uuid4().hex}"
    if kvstrata_toml is not None:
        transfer = kv_transfer_config(load_config(kvstrata_toml), kvstrata_toml, cpu=True)
        options["kv_transfer_config"] = transfer | {"engine_id": engine_id}
    llm = LLM(
        str(model),
        dtype="float32",
        block_size=BLOCK_TOKENS,
        enforce_eager=True,
        kv_cache_memory_bytes=kv_bytes,
        max_model_len=context,
        max_num_seqs=4,
        enable_prefix_caching=kvstrata_toml is not None,
        prefix_caching_hash_algo="sha256_cbor",
        disable_log_stats=False,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        Path(f"/dev/shm/vllm_offload_{engine_id}.mmap").unlink(missing_ok=True)


def ask(llm: LLM, prompt: Sequence[int], max_tokens: int = 16) -> Answer:
    """Greedy reply to a prompt of token ids."""
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=1, ignore_eos=True)
    output = llm.generate({"prompt_token_ids": list(prompt)}, sampling, use_tqdm=False)[0]
    reply = output.outputs[0]
    return Answer(
        list(reply.token_ids),
        [step[token].logprob for step, token in zip(reply.logprobs, reply.token_ids, strict=True)],
        output.metrics.first_token_latency,
        output.num_cached_tokens or 0,
    )


def store_of(llm: LLM) -> BlockStore:
    """The store under an engine that `engine` opened with a TOML."""
    core = llm.llm_engine.engine_core.engine_core
    return core.scheduler.connector.connector_scheduler.manager.secondary_tiers[0].store
