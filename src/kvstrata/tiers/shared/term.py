"""A collector's term: what it knows while it holds one epoch, and how it begins. Reads only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kvstrata.tiers.shared.audit import Auditor
from kvstrata.tiers.shared.catalog import Catalog, Feed
from kvstrata.tiers.shared.format import COLLECTOR, ExtentId, grants_name, parse_numbered
from kvstrata.tiers.shared.grants import GrantBook
from kvstrata.tiers.shared.ledger import Ledger
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.member import Member
from kvstrata.tiers.shared.order import Order, last_order
from kvstrata.tiers.shared.recency import AccessReader
from kvstrata.tiers.shared.small_files import FolderSettings, Grants


class CollectorConfig(Protocol):
    """What the collector reads of its tier's configuration."""

    @property
    def policy(self) -> str: ...

    @property
    def policy_options(self) -> Mapping[str, float]: ...

    @property
    def live_share(self) -> float: ...

    @property
    def rewrite_bytes_per_second(self) -> int: ...


@dataclass(slots=True)
class Term:
    """What this member knows as the collector of one epoch.

    doomed: extents that are gone by our word and whose files may be there yet. unspoken: extents that are
    there and not in our journal yet. failed: of which nobody knows whether they are there. overhead_bytes:
    found by the last audit and in no journal. distrusted: members whose limits nobody knows. buried:
    members whose folders were removed. starved: cycles in a row that left members without room.
    """

    epoch: int
    ledger: Ledger
    book: GrantBook
    feed: Feed
    reader: AccessReader
    auditor: Auditor
    distrusted: set[int] = field(default_factory=set)
    buried: set[int] = field(default_factory=set)
    unreadable: set[ExtentId] = field(default_factory=set)
    moved: set[ExtentId] = field(default_factory=set)
    failed: set[ExtentId] = field(default_factory=set)
    unspoken: dict[ExtentId, int] = field(default_factory=dict)
    doomed: dict[ExtentId, int] = field(default_factory=dict)
    audit_at: float = -math.inf
    cycle_at: float = 0.0
    budget_bytes: float = 0.0
    overhead_bytes: int = 0
    granted: bool = False
    starved: int = 0
    counted: Mapping[str, int] = field(default_factory=dict)


def begin_term(
    medium: Medium,
    member: Member,
    catalog: Catalog,
    settings: FolderSettings,
    config: CollectorConfig,
    epoch: int,
    reserve_bytes: int,
    clock: Callable[[], float],
) -> Term:
    """Take over what the collectors before left. Raises OSError."""
    names = medium.names(COLLECTOR)
    carried, damaged = _last_grants(medium, names, epoch)
    order = last_order(medium, names)
    capacity_bytes = settings.capacity_bytes
    book = GrantBook(epoch, member.word, capacity_bytes, reserve_bytes, settings.extent_bytes, carried)
    distrusted: set[int] = set()
    if damaged:
        # What the members may write is anybody's guess: all of them have to begin anew.
        distrusted = {member.id, *member.others()}
        book.debt_bytes = capacity_bytes
    live_bytes = int(max(0, capacity_bytes - reserve_bytes) * config.live_share)
    ledger = Ledger(config.policy, config.policy_options, live_bytes)
    feed = catalog.follow()
    _recall(ledger, order, feed)
    return Term(
        epoch=epoch,
        ledger=ledger,
        book=book,
        feed=feed,
        reader=AccessReader(order.known),
        auditor=Auditor(medium, catalog, settings.lease_seconds, clock),
        distrusted=distrusted,
        cycle_at=clock(),
        budget_bytes=settings.extent_bytes,
    )


def _recall(ledger: Ledger, order: Order, feed: Feed) -> None:
    """Begin with what there is, in the order that the collector before us knew."""
    for change in feed.take():
        for extent in change.added:
            if not order.is_newer(extent):
                ledger.add(extent)
        ledger.recall(order.words)
        for extent in change.added:
            ledger.add(extent)
        for extent in change.gone:
            ledger.remove(extent)


def _last_grants(medium: Medium, names: Mapping[str, int], epoch: int) -> tuple[Grants | None, bool]:
    """Of the highest epoch that wrote any, ours included if we held it before; and are they unreadable?"""
    numbers = [parse_numbered(name, "grants") for name in names]
    last = max((number for number in numbers if number is not None and number <= epoch), default=0)
    if not last:
        return None, False
    grants = Grants.decode(medium.fetch(grants_name(last)) or b"")
    return grants, grants is None
