"""`kvstrata sim`: puts its commands together."""

from __future__ import annotations

import typer

from kvstrata.cli.sim_advise import advise
from kvstrata.cli.sim_curve import curve
from kvstrata.cli.sim_report import report
from kvstrata.cli.sim_run import run
from kvstrata.cli.sim_sweep import sweep
from kvstrata.cli.sim_tiers import tiers
from kvstrata.cli.sim_tune import tune

app = typer.Typer(name="sim", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def sim(context: typer.Context) -> None:
    """Simulate: which policy and what capacity would hold this traffic?

    \b
    Examples:
      kvstrata sim run conversation_trace.jsonl.gz --policy all --capacity 5%
      kvstrata sim advise conversation_trace.jsonl.gz --bottleneck latency
      kvstrata sim sweep traces/*.parquet -o results/
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (run, sweep, tune, report, advise, curve, tiers):
    app.command(_command.__name__)(_command)
