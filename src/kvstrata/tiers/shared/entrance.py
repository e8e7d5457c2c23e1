"""Entrance: finds the folder that all members share, or makes it, and sees that it is still the same."""

from __future__ import annotations

import errno
import secrets
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kvstrata.errors import FormatVersionError
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.shared.extent_file import extent_bytes
from kvstrata.tiers.shared.fields import SharedFields
from kvstrata.tiers.shared.format import SETTINGS_FILE, VERSION
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.small_files import FORMAT, FolderSettings, reserve_bytes

EXTENTS_WANTED = 32
"""A small capacity is still cut into so many extents, so that one can leave alone."""
SETTLE_SECONDS = 0.2
"""A settings file that is being written is read again after so long."""

T = TypeVar("T")


class Entrance:
    """own: what the folder gets if this member makes it. lay_out: called just before that, once the tree of
    folders is there. where: the folder's name, for people."""

    def __init__(
        self,
        medium: Medium,
        own: FolderSettings,
        telemetry: Telemetry,
        tier: str,
        *,
        lay_out: Callable[[], None],
        where: Callable[[], str],
    ) -> None:
        self._medium = medium
        self.own = own
        self._telemetry = telemetry
        self._tier = tier
        self._lay_out = lay_out
        self._where = where
        self._settings: FolderSettings | None = None

    @property
    def settings(self) -> FolderSettings:
        """Of the folder, once it was entered."""
        assert self._settings is not None, f"tier {self._tier} is not open"
        return self._settings

    def enter(self, seconds: float) -> FolderSettings:
        """The folder's settings. Raises FormatVersionError, OSError: also if that takes longer."""
        self._settings = _within(seconds, self._enter)
        return self._settings

    def _enter(self) -> FolderSettings:
        """The folder's settings, made now if nobody has. Raises OSError, FormatVersionError."""
        data = self._medium.fetch(SETTINGS_FILE)
        if data is None:
            self._medium.prepare()
            self._lay_out()
            self._medium.create(SETTINGS_FILE, self.own.encode())
            data = self._medium.fetch(SETTINGS_FILE)
        settings = FolderSettings.decode(data or b"")
        if settings is None:
            time.sleep(SETTLE_SECONDS)
            settings = FolderSettings.decode(self._medium.fetch(SETTINGS_FILE) or b"")
        if settings is None:
            raise FormatVersionError(
                f"{SETTINGS_FILE} is not what kvstrata wrote; choose an empty folder, or delete this one",
                tier=self._tier,
            )
        if settings.version != VERSION:
            raise FormatVersionError(
                f"the folder holds format {FORMAT} version {settings.version}, this kvstrata reads version "
                f"{VERSION}; use the kvstrata that wrote it, or choose an empty folder",
                tier=self._tier,
            )
        self._compare(settings)
        return settings

    def _compare(self, settings: FolderSettings) -> None:
        """The folder's settings hold for all its members; whose configuration differs is told."""
        for name in ("capacity_bytes", "extent_bytes", "lease_seconds"):
            mine, theirs = getattr(self.own, name), getattr(settings, name)
            if mine != theirs:
                self._telemetry.event(
                    f"{self._tier} settings differ",
                    f"{name} is {mine} here and {theirs} in the folder, which holds; to change it, stop "
                    f"all members and delete {SETTINGS_FILE}",
                )

    def check(self) -> None:
        """Is this still the folder that was opened? Raises OSError (ENODEV) if not."""
        data = self._medium.fetch(SETTINGS_FILE)
        found = FolderSettings.decode(data) if data is not None else None
        if data is None or (found is not None and found.folder != self.settings.folder):
            raise OSError(errno.ENODEV, f"{self._where()} is not there any more; is it mounted?")


def own_settings(config: SharedFields, stride: int, version: str) -> FolderSettings:
    """What a folder would get that this member makes. stride: of a block's slot."""
    room = config.capacity_bytes - reserve_bytes(config.capacity_bytes)
    most = max(room // EXTENTS_WANTED, extent_bytes(1, stride))
    return FolderSettings(
        folder=secrets.token_hex(8),
        capacity_bytes=config.capacity_bytes,
        extent_bytes=min(config.extent_bytes, most),
        lease_seconds=config.lease_seconds,
        made_by=version,
    )


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Run what may hang on a thread of its own, for so long. Raises what it raises, or OSError."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="kvstrata-open", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise OSError(errno.ETIMEDOUT, f"no answer for {seconds:g} s")
    return results[0]
