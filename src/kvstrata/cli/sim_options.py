"""What the commands of `kvstrata sim` share: options, how they are read, and how runs are printed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from kvstrata.cli.output import one_line, print_line, print_table
from kvstrata.config import format_size
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.sim.metrics import RunResult

ALL = "all"
STUDY_CAPACITIES = "0.1%,1%,5%,10%,20%,40%"

POLICY_HELP = "Policies, separated by commas, or all (belady, the oracle, among them)."
CAPACITY_HELP = "Capacities: shares of the unique blocks (1%), blocks (5000b), bytes (64GiB)."
SET_OPTION = typer.Option(
    None, "--set", metavar="TEXT", help="A policy's parameter, such as tinylfu_slru.cms_width=65536."
)
JOBS_OPTION = typer.Option(
    None, "-j", "--jobs", metavar="N", help="Processes. [default: as many as there are cores]"
)
FOLDER_OPTION = typer.Option(
    ..., "-o", "--output", metavar="DIR", readable=False, help="Folder for the results; made if missing."
)


def read_policies(text: str) -> list[str]:
    """Names of policies that can be simulated, each once. Raises ConfigError."""
    from kvstrata.sim.replay import SIMULATED

    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not names:
        raise ConfigError(f"--policy: no policy in {text!r}; take some of {', '.join(SIMULATED)}, or all")
    if ALL in names:
        return list(SIMULATED)
    for name in names:
        if name not in SIMULATED:
            close = difflib.get_close_matches(name, SIMULATED, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            known = ", ".join((*SIMULATED, ALL))
            raise ConfigError(f"--policy: {name!r} is not known{hint}; known: {known}")
    return names


def read_settings(texts: Iterable[str], policies: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """`policy.name=value[,value...]` per policy and parameter; the policy may be left out if there is one.

    Raises ConfigError.
    """
    from kvstrata.sim.grid import defaults_of

    settings: dict[str, dict[str, list[float]]] = {}
    for text in texts:
        left, equals, right = text.partition("=")
        policy, dot, knob = left.strip().rpartition(".")
        if not dot and len(policies) == 1:
            policy = policies[0]
        if not equals or not knob or not policy:
            raise ConfigError(f"--set {text!r}: write POLICY.PARAMETER=VALUE, as arc.name=0.5")
        if policy not in policies:
            raise ConfigError(f"--set {text!r}: {policy} is not among --policy {','.join(policies)}")
        knobs = defaults_of(policy)
        if knob not in knobs:
            has = f"it has {', '.join(knobs)}" if knobs else "it has none"
            raise ConfigError(f"--set {text!r}: policy {policy} has no parameter {knob!r}; {has}")
        try:
            values = [float(word) for word in right.split(",")]
        except ValueError:
            raise ConfigError(f"--set {text!r}: {right!r} is not a number") from None
        if not all(abs(value) < 1e18 for value in values):
            raise ConfigError(f"--set {text!r}: {right!r} is not a number that a policy can take")
        if knob in settings.setdefault(policy, {}):
            raise ConfigError(f"--set {text!r}: {policy}.{knob} is set twice")
        settings[policy][knob] = values
    return settings


def read_variants(policy: str, settings: Iterable[str]) -> list[tuple[str, dict[str, float]]]:
    """The chosen policies, each with one value for every parameter that is set. Raises ConfigError."""
    policies = read_policies(policy)
    chosen = read_settings(settings, policies)
    for name, knobs in chosen.items():
        for knob, values in knobs.items():
            if len(values) > 1:
                raise ConfigError(f"--set {name}.{knob}: one value here; `kvstrata sim tune` takes several")
    return [(name, {k: v[0] for k, v in chosen.get(name, {}).items()}) for name in policies]


# Printing


def run_to_json(run: RunResult) -> dict[str, Any]:
    """All fields; whole parameters without a fraction."""
    return run.as_dict() | {"params": plain_params(run.params)}


def plain_params(params: Mapping[str, float]) -> dict[str, float]:
    return {name: int(value) if float(value).is_integer() else value for name, value in params.items()}


def params_label(params: Mapping[str, float], policy: str) -> str:
    """The policy and what differs from its defaults."""
    from kvstrata.sim.grid import defaults_of

    knobs = defaults_of(policy)
    return " ".join([policy, *(f"{k}={v:g}" for k, v in params.items() if knobs.get(k) != v)])


def show_runs(runs: Sequence[RunResult]) -> None:
    """A table per trace. Byte hits are shown where sizes differ; elsewhere they are the block hits."""
    figures: dict[str, Callable[[RunResult], object]] = {
        "share>": lambda run: f"{run.capacity_fraction * 100:.4g}%",
        "size>": lambda run: format_size(run.capacity_bytes),
        "block>": lambda run: ratio(run.block_hit_ratio),
        "prefix>": lambda run: ratio(run.usable_prefix_hit_ratio),
        "request>": lambda run: ratio(run.request_hit_ratio),
        "byte>": lambda run: ratio(run.byte_hit_ratio),
        "amplif.>": lambda run: ratio(run.amplification),
        "wasted>": lambda run: ratio(run.wasted_ratio),
        "evictions>": lambda run: run.evictions,
        "gap>": lambda run: ratio(run.gap_to_belady),
    }
    if all(run.byte_hit_ratio == run.block_hit_ratio for run in runs):
        del figures["byte>"]
    if all(run.gap_to_belady is None for run in runs):
        del figures["gap>"]
    for trace in dict.fromkeys(run.trace for run in runs):
        of_trace = [run for run in runs if run.trace == trace]
        one = of_trace[0]
        print_table(
            f"{one_line(trace)}: {one.requests} requests, {one.accesses} accesses, "
            f"{one.unique_blocks} unique blocks",
            ["policy", *figures],
            [
                (params_label(run.params, run.policy), *(show(run) for show in figures.values()))
                for run in of_trace
            ],
        )
    gap = "; gap: to belady's block hit ratio" if "gap>" in figures else ""
    kinds = "block, prefix, request, byte" if "byte>" in figures else "block, prefix, request"
    print_line(f"{kinds}: hit ratios, prefix the usable one; amplif.: bytes populated / bytes hit{gap}")


def ratio(value: float | None) -> str:
    return "-" if value is None or value == float("inf") else f"{value:.4f}"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def tell_skipped(skipped: Mapping[str, int]) -> None:
    """On stderr, so that --json stays clean."""
    for name, count in skipped.items():
        typer.echo(f"{one_line(name)}: skipped {counted(count, 'broken record')}", err=True)
