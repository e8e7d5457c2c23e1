"""How a command reads the traces that it is given: ten options, the same for all commands.

A command that is decorated with `reads_traces` has one parameter `reading: Reading`; in its place the
command line has the options. Knows no format: that is `kvstrata.traces.open`'s business.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from kvstrata.cli.sizes import read_size
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.sim.specs import TraceSpec
    from kvstrata.traces.open import OpenOptions

Command = TypeVar("Command", bound=Callable[..., Any])

TRACE_HELP = "A trace file, or a folder of agentic conversations."
SKIP_BAD_OPTION = typer.Option(
    False, "--skip-bad", help="Pass over records that cannot be read; count them."
)
BLOCK_BYTES_OPTION = typer.Option(
    None,
    "--block-bytes",
    metavar="SIZE",
    help="Size of every block, such as 64MiB, in place of the trace's.",
)
BYTES_PER_TOKEN_OPTION = typer.Option(
    None,
    "--bytes-per-token",
    metavar="SIZE",
    help="KV bytes of a token, for traces that count tokens. [default: 131072]",
)
SEED_OPTION = typer.Option(1, "--seed", metavar="N", help="Seed of the order and the arrivals of a stream.")
MEAN_ARRIVAL_OPTION = typer.Option(
    120.0, "--mean-arrival", metavar="SECONDS", help="Mean time between two conversations of a stream."
)

OPTIONS: dict[str, Any] = {
    "format": typer.Option(
        None, "--format", metavar="NAME", help="Format of the trace; by default its content tells."
    ),
    "skip_bad": SKIP_BAD_OPTION,
    "block_bytes": BLOCK_BYTES_OPTION,
    "bytes_per_token": BYTES_PER_TOKEN_OPTION,
    "block_tokens": typer.Option(
        None,
        "--block-tokens",
        metavar="N",
        help="Tokens of a block, where that is open: agentic (64), folders of it (256), Mooncake (512).",
    ),
    "full_blocks": typer.Option(
        False, "--full-blocks", help="Of Mooncake traces, leave out the partial block at a request's end."
    ),
    "csv_columns": typer.Option(
        None,
        "--csv-columns",
        metavar="TEXT",
        help="Columns of a CSV trace, such as time-col=1,obj-id-col=2,obj-size-col=3.",
    ),
    "path_prefix": typer.Option(
        None, "--path-prefix", metavar="DIR", help="Of an strace log, only files under this folder."
    ),
    "seed": SEED_OPTION,
    "mean_arrival": MEAN_ARRIVAL_OPTION,
}
"""By the field of `Reading`."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the options said, as they were written. format: None where the content is to tell."""

    format: str | None = None
    skip_bad: bool = False
    block_bytes: str | None = None
    bytes_per_token: str | None = None
    block_tokens: int | None = None
    full_blocks: bool = False
    csv_columns: str | None = None
    path_prefix: str | None = None
    seed: int = 1
    mean_arrival: float = 120.0

    def options(self) -> OpenOptions:
        """Raises ConfigError for a size that is none."""
        from kvstrata.traces.open import OpenOptions
        from kvstrata.traces.trace import DEFAULT_BYTES_PER_TOKEN

        return OpenOptions(
            skip_bad=self.skip_bad,
            block_bytes=_size("--block-bytes", self.block_bytes),
            bytes_per_token=_size("--bytes-per-token", self.bytes_per_token) or DEFAULT_BYTES_PER_TOKEN,
            seed=self.seed,
            mean_arrival_s=self.mean_arrival,
            block_tokens=self.block_tokens,
            full_blocks=self.full_blocks,
            csv_columns=self.csv_columns,
            path_prefix=self.path_prefix,
        )

    def specs(self, paths: Sequence[Path]) -> list[TraceSpec]:
        """The traces that were named. Raises ConfigError and OSError; reads none of them."""
        from kvstrata.sim.specs import trace_specs

        return trace_specs(paths, self.format, self.options())


def _size(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    size = read_size(option, text)
    if size == 0:
        raise ConfigError(f"{option}: take at least one byte")
    return size


def reads_traces(command: Command) -> Command:
    """Put the options in the place of the command's parameter `reading`."""
    names = [field.name for field in fields(Reading)]
    kinds = inspect.get_annotations(Reading, eval_str=True)
    options = [
        inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=OPTIONS[name], annotation=kinds[name]
        )
        for name in names
    ]
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += options if parameter.name == "reading" else [parameter]

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        reading = Reading(**{name: given.pop(name) for name in names})
        return command(reading=reading, **given)

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call  # type: ignore[return-value]
