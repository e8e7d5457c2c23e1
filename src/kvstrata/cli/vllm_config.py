"""`kvstrata vllm-config`: prints the JSON for vLLM's --kv-transfer-config. Does not need vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from kvstrata.config import load_config
from kvstrata.connectors.vllm.launch import kv_transfer_config
from kvstrata.errors import ConfigError


def vllm_config(
    config: Path = typer.Option(
        Path("kvstrata.toml"), "--config", readable=False, help="The configuration file."
    ),
    cpu: bool = typer.Option(False, "--cpu", help="For a vLLM that runs without a GPU."),
    pretty: bool = typer.Option(False, "--pretty", help="Print it on several lines."),
) -> None:
    """Print what vLLM needs to use kvstrata.

    The JSON for --kv-transfer-config, and nothing else. The configuration is checked first; the JSON
    names its absolute path, where vLLM reads it when it starts.

    \b
    Examples:
      kvstrata vllm-config --config kvstrata.toml --pretty
      vllm serve MODEL --kv-transfer-config "$(kvstrata vllm-config --config kvstrata.toml)"
    """
    settings = load_config(config)
    if not settings.tiers:
        raise ConfigError(f"{config}: no tier is configured; add a [[tier]] table")
    typer.echo(json.dumps(kv_transfer_config(settings, config, cpu=cpu), indent=2 if pretty else None))
