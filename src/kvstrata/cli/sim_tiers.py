"""`kvstrata sim tiers`: a trace through several tiers, what each serves, and the TTFT that makes."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from kvstrata.cli.output import JSON_OPTION, ProgressBar, one_line, print_json, print_line, print_table
from kvstrata.cli.reading import TRACE_HELP, Reading, reads_traces
from kvstrata.cli.sim_options import tell_skipped
from kvstrata.config import (
    Config,
    MemoryTierConfig,
    PoolTierConfig,
    WriteMode,
    format_size,
    load_config,
    parse_size,
)
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.sim.tiers import Sources, TierSpec, TiersResult
    from kvstrata.sim.ttft import Percentiles, Ttft

TIER_KEYS = ("policy", "capacity", "bandwidth", "read", "write", "latency")
FIRST_TIER_KEYS = ("promote", "write_mode")
LATENCY_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
MOSTLY_WAITING = 10
"""Mean TTFT with waiting / without from which we say that it is a matter of load."""
DEFAULT_TIERS = ("memory", "nvme")

TIER_HELP = (
    "A tier, fastest first: KIND,key=value,... with policy, capacity, bandwidth (or read and write), "
    "latency, any parameter of the policy; on the first tier promote=on|off and write_mode=back|through."
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tiers to simulate, and how the first one passes blocks on."""

    tiers: list[TierSpec]
    promote: bool
    write_mode: WriteMode


@reads_traces
def tiers(
    trace: Path = typer.Argument(metavar="TRACE", readable=False, help=TRACE_HELP),
    tier: list[str] | None = typer.Option(None, "--tier", metavar="TEXT", help=TIER_HELP),
    config: Path | None = typer.Option(
        None,
        "--config",
        metavar="FILE",
        readable=False,
        help="Take kinds, policies and capacities of tiers from a kvstrata.toml; --tier changes or adds.",
    ),
    prefill_tokens_per_second: float = typer.Option(
        20_000.0,
        "--prefill-tokens-per-second",
        metavar="N",
        help="Speed of prefill of all GPUs together.",
    ),
    attention_tokens: float = typer.Option(
        0.0,
        "--attention-tokens",
        metavar="N",
        help="Context at which attention costs as much as all else (Llama 3 8B: 30600); 0: leave it out.",
    ),
    sources: str = typer.Option(
        "computed",
        "--sources",
        metavar="NAME",
        help="What a save has bytes for: computed blocks, or whole.",
    ),
    no_queue: bool = typer.Option(False, "--no-queue", help="TTFT of each request as if it were alone."),
    output: Path | None = typer.Option(
        None, "-o", "--output", metavar="FILE", readable=False, help="Write a picture: .png, .svg or .pdf."
    ),
    force: bool = typer.Option(False, "--force", help="Replace the picture if it exists."),
    reading: Reading = Reading(),
    as_json: bool = JSON_OPTION,
) -> None:
    """Simulate tiers in front of each other: hits, traffic and TTFT.

    Each tier has its own policy, capacity, bandwidth and latency. Without --tier and --config: memory and
    nvme. What is not said is taken from here (policy lru; line rates less a fifth, nothing measured):

    \b
      kind          capacity  read      write     latency
      memory        64GiB     50GB/s    50GB/s    10us     PCIe 5.0 x16
      nvme          1TiB      7GB/s     5GB/s     100us    one PCIe 4.0 drive
      pool          1TiB      20GB/s    20GB/s    50us     one 200 Gb/s port
      shared_fs     16TiB     10GB/s    5GB/s     1ms      one 100 Gb/s port
      object_store  64TiB     2.5GB/s   2.5GB/s   20ms     one 25 Gb/s port

    \b
    Examples:
      kvstrata sim tiers conversation_trace.jsonl.gz
      kvstrata sim tiers stream.parquet --config kvstrata.toml --prefill-tokens-per-second 60000
      kvstrata sim tiers conversation_trace.jsonl.gz -o tiers.png \\
        --tier memory,capacity=64GiB,policy=arc --tier nvme,capacity=2TiB,bandwidth=12GB/s,latency=80us \\
        --tier shared_fs,capacity=100%
    """
    from kvstrata.sim.replay import Workload
    from kvstrata.sim.report.tiers_picture import check_picture, draw_tiers
    from kvstrata.sim.tiers import simulate_tiers
    from kvstrata.sim.ttft import ComputeModel

    if sources not in ("computed", "whole"):
        raise ConfigError(f"--sources: {sources!r} is not one of computed, whole")
    compute = ComputeModel(prefill_tokens_per_second, attention_tokens)
    wanted = wanted_tiers(tier or (), load_config(config) if config else None, str(config))
    if output is not None:
        check_picture(output)
        if output.exists() and not force:
            raise ConfigError(f"{output}: exists; name another file or add --force")
    specs = reading.specs([trace])
    with ProgressBar(f"reading {one_line(trace)}", "conversations") as progress:
        source = specs[0].source(progress)
    if source.head.skipped:
        tell_skipped({specs[0].name: source.head.skipped})
    workload = Workload(source, specs[0].name)
    with ProgressBar("simulating", "accesses") as progress:
        result = simulate_tiers(
            workload,
            wanted.tiers,
            compute,
            promote=wanted.promote,
            write_mode=wanted.write_mode,
            sources=cast("Sources", sources),
            queue=not no_queue,
            progress=progress,
        )
    if output is not None:
        draw_tiers(result, output)
    if as_json:
        print_json(result.as_dict() | {"links_of": _links_of(wanted.tiers)})
    else:
        _show(result, wanted.tiers)
        if output is not None:
            print_line(f"wrote {one_line(output)}")


def _links_of(specs: Sequence[TierSpec]) -> dict[str, Any]:
    return {
        spec.name: {
            "read_bytes_per_second": spec.read_bytes_per_second,
            "write_bytes_per_second": spec.write_bytes_per_second,
            "latency_seconds": spec.latency_seconds,
        }
        for spec in specs
    }


# What tiers are asked for


def wanted_tiers(texts: Sequence[str], config: Config | None, source: str) -> Wanted:
    """Tiers of a configuration, changed and followed by those of --tier; without either the default ones.

    source: names the configuration in errors. Raises ConfigError.
    """
    from kvstrata.sim.tiers import TIER_DEFAULTS

    specs: dict[str, TierSpec] = {}
    first: dict[str, str] = {}
    if config is not None:
        if not config.tiers:
            raise ConfigError(f"{source}: no [[tier]] in this configuration")
        for number, live in enumerate(config.tiers):
            if live.type in specs:
                raise ConfigError(
                    f"{source}: two tiers of type {live.type}: the simulator takes one of a kind"
                )
            specs[live.type] = TIER_DEFAULTS[live.type]
            if not isinstance(live, PoolTierConfig):  # which decides itself what leaves
                specs[live.type] = dataclasses.replace(
                    TIER_DEFAULTS[live.type],
                    policy=live.policy,
                    params=dict(live.policy_options),
                    capacity=f"{live.capacity_bytes}B",
                )
            if isinstance(live, MemoryTierConfig):
                first["promote"] = "on" if live.promote else "off"
            elif number == 1:
                first["write_mode"] = live.write_mode
    elif not texts:
        texts = DEFAULT_TIERS
    seen: set[str] = set()
    for text in texts:
        kind, keys = _split(text)
        if kind in seen:
            raise ConfigError(f"--tier {text}: there is a tier {kind} already; each kind goes once")
        seen.add(kind)
        specs[kind] = _spec(text, specs.get(kind) or _default(text, kind), keys)
        passing = {key: keys[key] for key in FIRST_TIER_KEYS if key in keys}
        if passing and kind != next(iter(specs)):
            raise ConfigError(
                f"--tier {text}: {min(passing)} belongs to the first tier, {next(iter(specs))}"
            )
        first |= passing
    promote = first.get("promote", "on").lower()
    if promote not in ("on", "off", "true", "false"):
        raise ConfigError(f"--tier: promote={promote}: write on or off")
    write_mode = first.get("write_mode", "back")
    if write_mode not in ("back", "through"):
        raise ConfigError(f"--tier: write_mode={write_mode}: write back or through")
    return Wanted(list(specs.values()), promote in ("on", "true"), cast(WriteMode, write_mode))


def _split(text: str) -> tuple[str, dict[str, str]]:
    kind, *rest = (part.strip() for part in text.split(","))
    keys: dict[str, str] = {}
    for part in rest:
        key, equals, value = (word.strip() for word in part.partition("="))
        if not (key and equals and value):
            raise ConfigError(f"--tier {text}: {part!r} is not key=value")
        if key in keys:
            raise ConfigError(f"--tier {text}: {key} is given twice")
        keys[key] = value
    return kind, keys


def _default(text: str, kind: str) -> TierSpec:
    from kvstrata.sim.tiers import TIER_DEFAULTS

    if kind not in TIER_DEFAULTS:
        raise ConfigError(f"--tier {text}: {kind!r} is no kind of tier{_known(kind, list(TIER_DEFAULTS))}")
    return TIER_DEFAULTS[kind]


def _spec(text: str, spec: TierSpec, keys: Mapping[str, str]) -> TierSpec:
    from kvstrata.policies import POLICIES
    from kvstrata.sim.replay import SIMULATED

    policy = keys.get("policy", spec.policy)
    if policy not in SIMULATED:
        raise ConfigError(f"--tier {text}: {policy!r} is no policy{_known(policy, list(SIMULATED))}")
    knobs = POLICIES[policy].KNOBS if policy in POLICIES else {}
    params = dict(spec.params) if policy == spec.policy else {}
    for key, value in keys.items():
        if key in knobs:
            params[key] = _number(f"--tier {text}: {key}", value)
        elif key not in TIER_KEYS + FIRST_TIER_KEYS:
            known = _known(key, [*TIER_KEYS, *FIRST_TIER_KEYS, *knobs])
            raise ConfigError(f"--tier {text}: {key!r} is no key of a tier with policy {policy}{known}")
    both = keys.get("bandwidth")
    read, write = keys.get("read", both), keys.get("write", both)
    return dataclasses.replace(
        spec,
        policy=policy,
        params=params,
        capacity=keys.get("capacity", spec.capacity),
        read_bytes_per_second=_speed(text, read) if read else spec.read_bytes_per_second,
        write_bytes_per_second=_speed(text, write) if write else spec.write_bytes_per_second,
        latency_seconds=_latency(text, keys["latency"]) if "latency" in keys else spec.latency_seconds,
    )


def _known(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _number(where: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{where}: {text!r} is not a number") from None


def _speed(text: str, value: str) -> float:
    """Bytes per second of "7GB/s"."""
    size, _, per = value.partition("/")
    advice = 'write bytes per second, such as "7GB/s"'
    if per.strip() not in ("s", "") or re.search(r"[kKMGTP]b|bit|bps", size):
        raise ConfigError(f"--tier {text}: {value!r} is no bandwidth; {advice}")
    try:
        return float(parse_size(size))
    except ValueError:
        raise ConfigError(f"--tier {text}: {value!r} is no bandwidth; {advice}") from None


def _latency(text: str, value: str) -> float:
    """Seconds of "100us"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|ms|us|ns)", value)
    if not match:
        raise ConfigError(f'--tier {text}: {value!r} is no latency; write for example "100us" or "1ms"')
    return float(match[1]) * LATENCY_SECONDS[match[2]]


# What is shown


def _show(result: TiersResult, specs: Sequence[TierSpec]) -> None:
    promote = "on" if result.promote else "off"
    print_line(
        f"{one_line(result.trace)}: {result.requests} requests, {result.accesses} blocks asked for, "
        f"{result.unique_blocks} unique"
    )
    if len(specs) > 1:
        print_line(f"write_mode {result.write_mode}, promote {promote}, sources {result.sources}")
    print_line()
    print_table(
        "tiers",
        ["tier", "policy", "capacity>", "served>", "prefix hits>", "block hits>", "read>", "written>",
         "evictions>", "reading>", "writing>"],
        [
            (
                tier.name,
                tier.policy + "".join(f" {key}={value:g}" for key, value in spec.params.items()),
                f"{format_size(tier.capacity_bytes)} ({_percent(tier.capacity_fraction)})",
                _percent(tier.served_ratio),
                _percent(tier.usable_prefix_hit_ratio),
                _percent(tier.block_hit_ratio),
                format_size(tier.served_bytes),
                format_size(tier.written_bytes),
                tier.evictions,
                _load(tier.read_utilisation),
                _load(tier.write_utilisation),
            )
            for tier, spec in zip(result.tiers, specs, strict=True)
        ],
    )  # fmt: skip
    print_line(
        "served: of all blocks, by this tier. prefix and block hits: with the faster tiers together."
    )
    print_line("reading, writing: share of the time in which its link is busy.")
    for tier in result.tiers:
        if tier.write_utilisation is None or tier.write_utilisation >= 1:
            print_line(
                f"{tier.name}: its link is too slow for what comes in; a live store would drop blocks"
            )
    print_line()
    print_table(
        "links",
        ["from", "to", "why", "blocks>", "bytes>"],
        [
            (link.source, link.target, link.why, link.blocks, format_size(link.bytes))
            for link in result.links
        ],
    )
    _show_ttft(result)


def _show_ttft(result: TiersResult) -> None:
    ttft = result.ttft
    if ttft is None:
        print_line("no TTFT: the blocks of this trace are no runs of tokens")
        return
    rows: list[tuple[object, ...]] = []
    for waiting, cached, recompute, speedup in (
        ("no waiting", ttft.cached.alone, ttft.recompute.alone, ttft.speedup_alone),
        ("queued", ttft.cached.queued, ttft.recompute.queued, ttft.speedup_queued),
    ):
        if cached is None and recompute is None and waiting == "queued":
            continue
        rows.append((waiting, "with the tiers", *_figures(cached)))
        rows.append((waiting, "recompute", *_figures(recompute)))
        if speedup is not None:
            rows.append((waiting, "times faster", *(_times(speedup[name]) for name in _NAMES)))
    print_table(
        "modelled TTFT, seconds",
        ["", "served", *(f"{name}>" for name in ("mean", "p50", "p95", "p99"))],
        rows,
    )
    for name, way in (("with the tiers", ttft.cached), ("recompute", ttft.recompute)):
        print_line(f"{name}: {_utilisation(way)}")
        if way.queued is not None and way.queued.mean_seconds > MOSTLY_WAITING * way.alone.mean_seconds:
            print_line(
                "  nearly all of its queued TTFT is waiting: there are long spells of more than it can do"
            )
        if way.overloaded:
            print_line(
                f"  more than {' and '.join(way.overloaded)} can do: waiting would grow without end, so no "
                "queued TTFT is given; change the tier or --prefill-tokens-per-second"
            )


_NAMES = ("mean", "p50", "p95", "p99")


def _figures(percentiles: Percentiles | None) -> list[str]:
    if percentiles is None:
        return ["-"] * len(_NAMES)
    return [f"{getattr(percentiles, f'{name}_seconds'):.4g}" for name in _NAMES]


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _utilisation(way: Ttft) -> str:
    return "busy " + ", ".join(f"{server} {_load(load)}" for server, load in way.utilisation.items())


def _load(utilisation: float | None) -> str:
    return "all at once" if utilisation is None else f"{100 * utilisation:.1f} %"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"
