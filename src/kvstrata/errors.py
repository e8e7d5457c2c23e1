"""The whole exception tree.

KVStrataError
├── ConfigError            the configuration or a command line is wrong: says what to change
├── StoreClosedError       a call after close()
├── LayoutMismatchError    bytes of another shape than the store was opened for
├── TraceFormatError       a trace record that cannot be read
└── TierError              something about one tier; carries tier, key and slot where known
    ├── TierUnavailableError   the tier's medium does not answer, or answers errors
    ├── FolderLockedError      another process owns the folder
    ├── FormatVersionError     the folder was written in a format this version does not read
    └── BlockCorruptError      bytes on the medium are not what was saved

Outcomes that are part of normal life (a full tier, a miss) are values, see `kvstrata.types.Outcome`.
"""

from __future__ import annotations


class KVStrataError(Exception):
    """Root of everything that kvstrata raises on purpose."""


class ConfigError(KVStrataError):
    """A configuration that cannot work. The message names the file and key and says what to do."""


class StoreClosedError(KVStrataError):
    """The store was closed; open a new one."""


class LayoutMismatchError(KVStrataError):
    """Buffers or keys of another shape than the store's layout."""


class TraceFormatError(KVStrataError):
    """A trace record that cannot be read; names file and line."""


class TierError(KVStrataError):
    """Something about one tier."""

    def __init__(self, message: str, *, tier: str = "", key: bytes = b"", slot: int | None = None) -> None:
        where = [f"tier {tier}"] if tier else []
        if key:
            where.append(f"key {key.hex()[:16]}")
        if slot is not None:
            where.append(f"slot {slot}")
        super().__init__(f"{message} ({', '.join(where)})" if where else message)
        self.tier = tier
        self.key = key
        self.slot = slot


class TierUnavailableError(TierError):
    """The medium under the tier does not answer or answers errors."""


class FolderLockedError(TierError):
    """Another process owns the folder; the message names it."""


class FormatVersionError(TierError):
    """The folder was written in another format version."""


class BlockCorruptError(TierError):
    """What was read is not what was saved."""

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        tier: str = "",
        key: bytes = b"",
        slot: int | None = None,
    ) -> None:
        super().__init__(message, tier=tier, key=key, slot=slot)
        self.reason = reason
        """One word for the counter: header, key, place, length, checksum, short, expired."""
