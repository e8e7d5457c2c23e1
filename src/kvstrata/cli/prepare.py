"""`kvstrata prepare`: makes all segments of an nvme folder before a server needs them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvstrata.cli.output import JSON_OPTION, ProgressBar, one_line, print_json, print_line
from kvstrata.config import Config, NvmeTierConfig, format_size, load_config
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.tiers import NvmeTier
    from kvstrata.tiers.nvme_prepare import PrepareReport

CONFIG = "kvstrata.toml"


def prepare(
    config: Path = typer.Argument(
        Path(CONFIG), metavar="[CONFIG]", readable=False, help="The configuration file of the server."
    ),
    block_bytes: str = typer.Option(
        "",
        "--block-bytes",
        metavar="SIZE",
        help="Size of a block; else that of the segments that are there.",
        show_default=False,
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Make all segments of the nvme tier now.

    Each is written through once with zeros, so that blocks are later written at full speed. Takes
    the folder's lock; blocks that are there stay. What is done when you stop it stays, too.

    \b
    Examples:
      kvstrata prepare kvstrata.toml --block-bytes 4MiB
      kvstrata prepare kvstrata.toml --json | jq .prepared_segments
    """
    loaded = load_config(config)
    tier_config = _nvme_tier(loaded, config)
    size = _block_bytes(tier_config, block_bytes)
    tier = _make_tier(loaded, tier_config, size)
    tier.open()
    try:
        with ProgressBar("preparing segments", unit="MiB") as progress:
            report = tier.prepare_all(lambda done, of: progress(done >> 20, of >> 20))
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(
            error.errno, f"{why}; what was prepared until then stays", str(tier.folder)
        ) from error
    finally:
        tier.close(clean=True)
    if as_json:
        print_json(_to_json(tier.folder, size, report))
    else:
        _show(tier.folder, size, report)


def _nvme_tier(config: Config, file: Path) -> NvmeTierConfig:
    for tier in config.tiers:
        if isinstance(tier, NvmeTierConfig):
            return dataclasses.replace(tier, prepare="no")  # here, not by a thread
    raise ConfigError(f"{file}: there is no [[tier]] of type nvme, so there is nothing to prepare")


def _block_bytes(tier: NvmeTierConfig, wanted: str) -> int:
    """Bytes of a block: as told, or what fits the segments in the folder."""
    from kvstrata.cli.sizes import read_size
    from kvstrata.tiers.nvme_folder import segment_files
    from kvstrata.transfer.buffers import PAGE

    if wanted:
        size = read_size("--block-bytes", wanted)
        if size < 1:
            raise ConfigError("--block-bytes: a block has at least one byte")
        return size
    folder = Path(tier.path).expanduser()
    found = {file.header.stride - PAGE for file in segment_files(folder) if not isinstance(file, Path)}
    if len(found) == 1:
        return found.pop()
    if not found:
        raise ConfigError(
            f"{folder} holds no segments, so the size of a block is not known; give --block-bytes"
        )
    sizes = ", ".join(map(format_size, sorted(found)))
    raise ConfigError(
        f"{folder} holds segments for blocks of {sizes}; say with --block-bytes which to make"
    )


def _make_tier(config: Config, tier: NvmeTierConfig, block_bytes: int) -> NvmeTier:
    from kvstrata.telemetry import Telemetry
    from kvstrata.tiers import NvmeTier
    from kvstrata.transfer.file_io import FileIO
    from kvstrata.types import BlockLayout, Namespace

    layout = BlockLayout(block_bytes, 1)
    return NvmeTier(tier, layout, Namespace(bytes(32)), config.store, Telemetry(), FileIO())


def _to_json(folder: Path, block_bytes: int, report: PrepareReport) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "block_bytes": block_bytes,
        "segments": report.segments,
        "prepared_segments": report.prepared,
        "written_bytes": report.written_bytes,
        "left_out_segments": report.left_out,
        "seconds": round(report.seconds, 3),
    }


def _show(folder: Path, block_bytes: int, report: PrepareReport) -> None:
    speed = format_size(report.written_bytes / report.seconds) if report.seconds else "0 B"
    print_line(
        f"{one_line(folder)}: {report.prepared} of {report.segments} segments for blocks of "
        f"{format_size(block_bytes)} prepared: {format_size(report.written_bytes)} written "
        f"in {report.seconds:.2f} s ({speed}/s)"
    )
    there = report.segments - report.prepared - report.left_out
    if there:
        print_line(f"{there} were there before and are as they were")
    if report.left_out:
        print_line(
            f"{report.left_out} are left out: segments of other block sizes keep their room until then"
        )
