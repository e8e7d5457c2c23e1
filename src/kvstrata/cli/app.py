"""`kvstrata`: puts the commands together, and turns every error into one line and an exit code.

Exit codes: 0 good, 1 the command found something bad, 2 wrong use or input, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from kvstrata import __version__
from kvstrata.cli.init import init
from kvstrata.cli.inspect import inspect
from kvstrata.cli.output import one_line
from kvstrata.cli.prepare import prepare
from kvstrata.cli.serve import serve
from kvstrata.cli.sim import app as sim
from kvstrata.cli.stats import stats
from kvstrata.cli.trace import app as trace
from kvstrata.cli.verify import verify
from kvstrata.cli.vllm_config import vllm_config
from kvstrata.errors import KVStrataError

# ClickException, whose module differs between the releases of typer that we accept.
COMMAND_LINE_ERROR: Any = typer.BadParameter.__mro__[2]


class OneLineErrors(TyperGroup):
    """A command group whose errors are one line on stderr that says what to do, with exit code 2."""

    def main(self, *args: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
        except COMMAND_LINE_ERROR as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "kvstrata"
            _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`")
        except KVStrataError as error:
            _fail(str(error))
        except OSError as error:
            _fail(_describe(error))
        except (KeyboardInterrupt, typer.Abort):
            sys.exit(130)
        sys.exit(code or 0)


def _fail(message: str) -> None:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def _describe(error: OSError) -> str:
    what = error.strerror or str(error)
    where = f"{error.filename}: " if error.filename else ""
    if isinstance(error, PermissionError):
        return f"{where}{what}; run this as the user whose process uses the folder"
    return f"{where}{what}"


app = typer.Typer(
    name="kvstrata",
    cls=OneLineErrors,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 good, 1 something bad was found, 2 wrong use or input, 130 interrupted.",
)
for _command in (init, prepare, serve, inspect, verify, stats, vllm_config):
    app.command(_command.__name__.replace("_", "-"))(_command)
app.add_typer(trace)
app.add_typer(sim)


@app.callback(invoke_without_command=True)
def kvstrata(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """KV-cache storage for LLM servers.

    \b
    Examples:
      kvstrata init --nvme-path /mnt/nvme/kv
      vllm serve MODEL --kv-transfer-config "$(kvstrata vllm-config)"
      kvstrata inspect /mnt/nvme/kv
    """
    if version:
        typer.echo(f"kvstrata {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point of the `kvstrata` command."""
    typer.main.get_command(app).main(prog_name="kvstrata")
