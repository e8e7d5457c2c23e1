"""`kvstrata serve`: owns the tiers of a machine for several engine processes, until it is stopped."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import typer

from kvstrata.cli.output import (
    JSON_OPTION,
    format_age,
    one_line,
    print_json,
    print_line,
    print_table,
)
from kvstrata.cli.tier_table import print_tiers
from kvstrata.config import Config, ServeConfig, TierConfig, format_size, load_config
from kvstrata.errors import ConfigError

CONFIG = "kvstrata.toml"


def serve(
    config: Path = typer.Argument(
        Path(CONFIG), metavar="[CONFIG]", readable=False, help="The configuration file of the server."
    ),
    show_status: bool = typer.Option(
        False, "--status", help="Show who uses a running server, and what it holds."
    ),
    verbose: bool = typer.Option(False, "--verbose", help="Say on stderr who comes and goes."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Serve one set of tiers to several engine processes of this machine.

    Engines whose configuration says where (connect in [serve]) share what any of them has saved. Their
    memory is read and written in place. Runs until SIGTERM or Ctrl-C; then closes the tiers cleanly.

    \b
    Examples:
      kvstrata serve kvstrata.toml
      kvstrata serve kvstrata.toml --status
      kvstrata serve kvstrata.toml --status --json | jq '.clients[].pid'
    """
    loaded = load_config(config)
    if show_status:
        _show_status(loaded.serve, config, as_json)
        return
    if not loaded.serve.socket:
        raise ConfigError(f'{config}: serve.socket: is missing; write for example "/run/kvstrata/socket"')
    _serve(loaded, config, verbose, as_json)


def _serve(loaded: Config, file: Path, verbose: bool, as_json: bool) -> None:
    from kvstrata.serving.server import StoreServer

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(message)s"
    )
    stop = threading.Event()
    # Set before the server is there, so that no signal finds it half made.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with StoreServer(loaded) as server:
        if as_json:
            print_json({"socket": str(server.path), "tiers": [tier.type for tier in loaded.tiers]})
        else:
            tiers = ", ".join(_named(tier) for tier in loaded.tiers)
            print_line(f"serving {tiers} at {one_line(server.path)}")
            print_line(f"clients: connect = {one_line(server.path)!r} under [serve] in their configuration")
            if loaded.metrics.port:
                print_line(
                    f"metrics at {loaded.metrics.host}:{loaded.metrics.port} from the first client on"
                )
        while not stop.wait(1.0):
            pass


def _named(tier: TierConfig) -> str:
    capacity_bytes = getattr(tier, "capacity_bytes", 0)
    return f"{tier.type} {format_size(capacity_bytes)}" if capacity_bytes else tier.type


def _show_status(serve: ServeConfig, file: Path, as_json: bool) -> None:
    path = serve.socket or serve.connect
    if not path:
        raise ConfigError(f"{file}: serve.socket: is missing, so it is not known whom to ask")
    state = _ask(Path(path).expanduser().absolute(), serve)
    if as_json:
        print_json(state)
    else:
        _show(state)


def _ask(path: Path, serve: ServeConfig) -> dict[str, Any]:
    from kvstrata.serving.connection import AwayError, Connection, RefusedError
    from kvstrata.serving.protocol import Kind, ProtocolError, unpack_json

    try:
        connection = Connection(str(path), {"role": "observer"}, serve.call_seconds, serve.open_seconds)
    except (AwayError, RefusedError) as error:
        raise ConfigError(f"no answer at {path}: {error}; is `kvstrata serve` running?") from None
    try:
        answer = connection.call(Kind.STATUS)
        if answer is None:
            raise ConfigError(f"no answer at {path} within {serve.call_seconds:g} s")
        return unpack_json(answer)
    except ProtocolError as error:
        raise ConfigError(f"{path}: {error}") from None
    finally:
        connection.lose("closed")
        connection.bury()


def _show(state: dict[str, Any]) -> None:
    size = state["block_bytes"]
    print_line(
        f"{one_line(state['socket'])}: process {state['pid']}, up {format_age(state['up_seconds'])}, "
        f"{f'blocks of {format_size(size)}' if size else 'no client yet'}"
    )
    print_line()
    print_tiers(state["tiers"], name="name")
    print_table(
        "clients",
        [
            "process>",
            "namespace",
            "connected",
            "transfers>",
            "in flight>",
            "regions>",
            "registered>",
            "command",
        ],
        [
            (
                client["pid"],
                client["namespace"][:16],
                format_age(client["connected_seconds"]),
                client["transfers"],
                format_size(client["held_bytes"]),
                client["regions"],
                format_size(client["region_bytes"]),
                client["command"],
            )
            for client in state["clients"]
            if client["role"] != "observer"
        ],
    )
