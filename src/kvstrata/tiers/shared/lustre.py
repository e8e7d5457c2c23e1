"""How the files of a shared folder are laid out on Lustre: set once, by whoever makes the folder.

Extents are large and are read by many: they are striped. Journals and beats are small and are read all the
time: they lie on the metadata server (DoM), where that is one call less. Nothing happens elsewhere.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from kvstrata.config import SharedFsTierConfig, format_size
from kvstrata.tiers.shared.format import COLLECTOR, EXTENTS, MEMBERS, WRITING

COMMAND_SECONDS = 10.0


def lay_out(folder: Path, config: SharedFsTierConfig) -> list[str]:
    """Set the layouts of the folder; returns what was done, or why not, for people.

    stripe_count 0: the folder's own layout is left alone. Part files are renamed into `extents` with the
    layout that they were made with, so `writing` gets that of extents.
    """
    command = shutil.which("lfs")
    if command is None or not _run(command, "df", str(folder))[0]:
        return []
    notes: list[str] = []
    if config.stripe_count:
        for name in (WRITING, EXTENTS):
            striped = ["setstripe", "-c", str(config.stripe_count), "-S", str(config.stripe_bytes)]
            good, error = _run(command, *striped, str(folder / name))
            notes.append(
                f"{name}: stripes of {format_size(config.stripe_bytes)} over {config.stripe_count} targets"
                if good
                else f"{name}: lfs setstripe failed: {error}"
            )
    if config.dom_bytes:
        for name in (MEMBERS, COLLECTOR):
            layout = ["setstripe", "-E", str(config.dom_bytes), "-L", "mdt", "-E", "-1", "-c", "1"]
            good, error = _run(command, *layout, str(folder / name))
            notes.append(
                f"{name}: the first {format_size(config.dom_bytes)} of files on the metadata server"
                if good
                else f"{name}: lfs setstripe failed: {error}"
            )
    return notes


def _run(*words: str) -> tuple[bool, str]:
    """Did the command succeed, and what did it say if not?"""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, (done.stderr or done.stdout).strip()[:200]
