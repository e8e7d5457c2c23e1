"""Mover: what a tier asks of whatever moves its rows: the compiled engine, or a library in its place."""

from __future__ import annotations

from typing import Protocol

from kvstrata.transfer.engine import EngineCounts, OnDone, Rows
from kvstrata.transfer.handle import Abandonable


class Mover(Protocol):
    """`kvstrata.transfer.engine.Engine` says what each of these promises."""

    def submit(self, rows: Rows, *, loads: bool, on_done: OnDone) -> Abandonable: ...

    @property
    def queued(self) -> tuple[int, int]: ...

    @property
    def counts(self) -> EngineCounts: ...

    def oldest_seconds(self, *, loads: bool) -> float: ...

    def forgive(self) -> None: ...

    def drain(self, seconds: float) -> bool: ...

    def close(self, seconds: float) -> bool: ...
