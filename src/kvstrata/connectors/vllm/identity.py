"""Whose KV bytes are these? The namespace of a vLLM engine.

Everything that changes the bytes of a block, or what they mean, is a field: weights, config, dtype,
block and chunk size, the shape of the parallel group and the rank, the KV layout and groups, the engine's
version. LoRA adapters, multimodal inputs and cache salts are in vLLM's own block hashes, which are wrapped
in this namespace.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvstrata.errors import ConfigError
from kvstrata.hashing import namespace_digest
from kvstrata.types import Namespace

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
HEAD_BYTES = 1024 * 1024
SAMPLES = 256
SAMPLE_BYTES = 4096


def engine_namespace(offloading_config: Any, row_bytes: int, revision: str, salt: str) -> Namespace:
    """Namespace from vLLM's OffloadingConfig.

    row_bytes: bytes of one chunk over all ranks. revision: the operator's own word for the weights, used
    instead of looking at them. Raises ConfigError if it is empty and the weights cannot be found.
    """
    import vllm  # noqa: PLC0415 - only ever called inside vLLM
    from vllm.platforms import current_platform  # noqa: PLC0415

    model, cache, parallel = (
        offloading_config.model,
        offloading_config.cache,
        offloading_config.parallel,
    )
    fields: dict[str, Any] = {
        "engine": "vllm",
        "engine_version": vllm.__version__,
        "device": current_platform.device_type,
        "weights": revision or weights_fingerprint(model.name),
        "dtype": model.dtype,
        "tokens_per_hash": cache.tokens_per_hash,
        "blocks_per_chunk": cache.blocks_per_chunk,
        "row_bytes": row_bytes,
        "groups": [
            {
                "id": group.group_id,
                "tokens_per_block": group.tokens_per_block,
                "layers": list(group.layer_names),
            }
            for group in offloading_config.groups
        ],
        "world_size": parallel.world_size,
        "rank": parallel.rank,
        "tp": parallel.tp_size,
        "pp": parallel.pp_size,
        "pcp": parallel.pcp_size,
        "dcp": parallel.dcp_size,
        "replicated_layout": offloading_config.replicated_layout,
        "canonical_layout": offloading_config.canonical_layout,
        "kv_cache_layout": str(offloading_config.kv_cache_layout),
    }
    # The name is for people: where the weights lie does not change them.
    return Namespace(namespace_digest(fields, salt.encode()), {"model": model.name, **fields})


def weights_fingerprint(model: str) -> str:
    """A digest of the model's config.json, and of sizes, heads and samples of its weight files.

    model: a folder, or a name of which one revision lies in the Hugging Face cache. Every file gives its
    size, its first 1 MiB (the whole header of a safetensors file) and 256 blocks of 4 KiB spread over it.
    Raises ConfigError if there is nothing to look at, or more than one revision.
    """
    folders = [Path(model)] if Path(model).is_dir() else _cached_snapshots(model)
    if len(folders) != 1:
        seen = f"{len(folders)} revisions of" if folders else "none of"
        raise ConfigError(
            f"{seen} the weights of {model!r} can be seen, so blocks of others could not be told apart; "
            "set vllm.model_revision in the kvstrata config to a word that changes with the weights"
        )
    folder = folders[0]
    digest = blake3()
    found = False
    for path in sorted(_identity_files(folder)):
        found = True
        digest.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        for part in _samples(path):
            digest.update(part)
    if not found:
        raise ConfigError(
            f"{folder} holds neither a config.json nor weight files; set vllm.model_revision in the "
            "kvstrata config to a word that changes with the weights"
        )
    return digest.hexdigest()


def _cached_snapshots(model: str) -> list[Path]:
    """Every revision of a model that lies in the Hugging Face cache: vLLM does not tell which it loaded."""
    try:
        from huggingface_hub import constants  # noqa: PLC0415
        from huggingface_hub.file_download import repo_folder_name  # noqa: PLC0415
    except ImportError:
        return []
    name = repo_folder_name(repo_id=model, repo_type="model")
    return sorted(Path(constants.HF_HUB_CACHE, name, "snapshots").glob("*/"))


def _identity_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name == "config.json" or path.suffix in WEIGHT_SUFFIXES:
            yield path


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        yield file.read(HEAD_BYTES)
        step = (size - HEAD_BYTES) // SAMPLES
        if step <= SAMPLE_BYTES:
            yield file.read()
            return
        for sample in range(SAMPLES):
            file.seek(HEAD_BYTES + sample * step)
            yield file.read(SAMPLE_BYTES)
        file.seek(max(HEAD_BYTES, size - SAMPLE_BYTES))
        yield file.read(SAMPLE_BYTES)
