"""Small files of a shared folder, for programs and people: settings, beats, grants. JSON, no I/O here.

Unknown keys are ignored; a missing key or a wrong type makes the whole file undecodable, which is a value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from kvstrata.tiers.shared.format import VERSION, member_word, parse_member

FORMAT = "kvstrata-shared"


def reserve_bytes(capacity_bytes: int) -> int:
    """What is kept for small files and folders."""
    return max(2**20, capacity_bytes // 64)


@dataclass(frozen=True, slots=True)
class FolderSettings:
    """What all members of a folder agree on. folder: random, tells this folder from another one.

    extent_bytes: of a whole extent at most.
    """

    folder: str
    capacity_bytes: int
    extent_bytes: int
    lease_seconds: float
    made_by: str = ""
    version: int = VERSION

    def encode(self) -> bytes:
        return _to_json({"format": FORMAT, **asdict(self)})

    @staticmethod
    def decode(data: bytes) -> FolderSettings | None:
        """None for what is no such file. Another version decodes: its reader must look at `version`."""
        raw = _from_json(data)
        if raw is None or raw.get("format") != FORMAT:
            return None
        found = _typed(FolderSettings, raw)
        good = found and found.capacity_bytes > 0 and found.extent_bytes > 0 and found.lease_seconds > 0
        return found if good else None


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life. counter: grows with every one. wanted_bytes: what it wants beyond what it published.

    state: "open" or "closed". collect: may this member become the collector. published_bytes: as in its
    journal. grant_epoch, grant_counter: the last grants that it has read; limit_bytes: what it takes its
    limit to be since then.
    """

    member: str
    counter: int
    state: str = "open"
    wanted_bytes: int = 0
    published_bytes: int = 0
    collect: bool = True
    host: str = ""
    pid: int = 0
    version: str = ""
    capacity_bytes: int = 0
    lease_seconds: float = 0.0
    grant_epoch: int = 0
    grant_counter: int = 0
    limit_bytes: int = 0

    def encode(self) -> bytes:
        return _to_json(asdict(self))

    @staticmethod
    def decode(data: bytes) -> Beat | None:
        raw = _from_json(data)
        return None if raw is None else _typed(Beat, raw)


@dataclass(frozen=True, slots=True)
class Grant:
    """limit_bytes: what the member may have published in all. used_bytes: what it has, seen by the
    collector. held_bytes: the highest limit that it may still believe in. note: why it is not more, for
    people."""

    limit_bytes: int
    used_bytes: int = 0
    held_bytes: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Grants:
    """The collector's answer to all members. counter: grows with every one of an epoch.

    debt_bytes: room that members have who are in here no more, until their files are found and counted.
    """

    epoch: int
    collector: str
    counter: int = 0
    used_bytes: int = 0
    capacity_bytes: int = 0
    debt_bytes: int = 0
    members: Mapping[int, Grant] = field(default_factory=dict)

    def encode(self) -> bytes:
        raw = {name: getattr(self, name) for name in self.__slots__ if name != "members"}
        members = {member_word(member): asdict(grant) for member, grant in self.members.items()}
        return _to_json({**raw, "members": members})

    @staticmethod
    def decode(data: bytes) -> Grants | None:
        raw = _from_json(data)
        if raw is None:
            return None
        members: dict[int, Grant] = {}
        listed = raw.pop("members", None)
        if not isinstance(listed, dict):
            return None
        for word, value in listed.items():
            member = parse_member(word)
            grant = _typed(Grant, value) if isinstance(value, dict) else None
            if member is None or grant is None:
                return None
            members[member] = grant
        found = _typed(Grants, raw)
        if found is None:
            return None
        return replace(found, members=members)


_Found = TypeVar("_Found")
_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}


def _typed(cls: type[_Found], raw: Mapping[str, Any]) -> _Found | None:
    """An object from a mapping: unknown keys are ignored, a wrong type or a missing key is None."""
    fields: dict[str, Any] = {}
    for name, hint in cls.__annotations__.items():
        if name not in raw:
            continue
        value: Any = raw[name]
        kinds = _KINDS.get(hint)
        if kinds is None:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return None
        if isinstance(value, int | float) and not -(2**63) <= value < 2**63:
            return None
        fields[name] = value
    try:
        return cls(**fields)
    except TypeError:
        return None


def _to_json(raw: Mapping[str, Any]) -> bytes:
    return json.dumps(raw, indent=1).encode()


def _from_json(data: bytes) -> dict[str, Any] | None:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None
