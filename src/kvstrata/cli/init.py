"""`kvstrata init`: writes a commented configuration file. Does not create the tier's folder."""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import typer

from kvstrata.cli.config_text import config_text
from kvstrata.cli.output import print_line
from kvstrata.cli.sizes import read_size
from kvstrata.config import (
    Config,
    MemoryTierConfig,
    NvmeTierConfig,
    SharedFsTierConfig,
    TierConfig,
    parse_config,
)
from kvstrata.errors import ConfigError

NVME_PATH = "~/.cache/kvstrata"


def init(
    path: Path = typer.Argument(Path("kvstrata.toml"), help="The file to write."),
    nvme_path: str = typer.Option(NVME_PATH, help="Folder of the nvme tier."),
    nvme_capacity: str = typer.Option("", metavar="SIZE", help="Bound of that folder, such as 500GiB."),
    memory_capacity: str = typer.Option(
        "", metavar="SIZE", help="Add a memory tier of this size above the nvme tier."
    ),
    shared_path: str = typer.Option(
        "", metavar="DIR", help="Add a shared_fs tier below: a folder that other machines mount too."
    ),
    shared_capacity: str = typer.Option("", metavar="SIZE", help="Bound of that folder, for all together."),
    force: bool = typer.Option(False, "--force", help="Overwrite the file if it is there."),
) -> None:
    """Write a commented configuration file.

    It has every key, with its default and what it means.

    \b
    Examples:
      kvstrata init
      kvstrata init /etc/kvstrata.toml --nvme-path /mnt/nvme/kv --nvme-capacity 500GiB
      kvstrata init --memory-capacity 32GiB --force
      kvstrata init --nvme-path /mnt/nvme/kv --shared-path /mnt/lustre/kv --shared-capacity 20TiB
    """
    tiers: list[TierConfig] = []
    if memory_capacity:
        tiers.append(MemoryTierConfig(capacity_bytes=read_size("--memory-capacity", memory_capacity)))
    nvme = NvmeTierConfig(nvme_path, attach="always" if shared_path else "no")
    if nvme_capacity:
        nvme = replace(nvme, capacity_bytes=read_size("--nvme-capacity", nvme_capacity))
    tiers.append(nvme)
    if shared_capacity and not shared_path:
        raise ConfigError("--shared-capacity: name the folder with --shared-path")
    if shared_path:
        shared = SharedFsTierConfig(shared_path)
        if shared_capacity:
            shared = replace(shared, capacity_bytes=read_size("--shared-capacity", shared_capacity))
        tiers.append(shared)
    text = config_text(Config(tiers=tuple(tiers)))
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            "a path in TOML must be valid UTF-8; choose another --nvme-path or --shared-path"
        ) from None
    # Whatever the options said, the file that is written is one that can be loaded.
    parse_config(tomllib.loads(text), source="kvstrata init")
    try:
        with path.open("wb" if force else "xb") as file:
            file.write(data)
    except FileExistsError:
        raise ConfigError(f"{path} exists; choose another name, or overwrite it with --force") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first") from None
    print_line(f"wrote {path}; next: kvstrata vllm-config --config {shlex.quote(str(path))}")
