"""The memory that one client of `kvstrata serve` registered, as the server maps it, on huge pages."""

from __future__ import annotations

import logging

import numpy as np

from kvstrata.config import ServeConfig
from kvstrata.serving.protocol import NO_REGION, Move, ProtocolError
from kvstrata.telemetry import Telemetry
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.huge_pages import HugePageCare
from kvstrata.transfer.shared_memory import Mapping

log = logging.getLogger(__name__)


class ClientMemory:
    """serve: how many regions there may be, and whether on huge pages. name: of the threads for these.

    pid: whose it is, for the log.
    """

    def __init__(self, serve: ServeConfig, telemetry: Telemetry, pid: int, name: str) -> None:
        self._serve = serve
        self._telemetry = telemetry
        self._pid = pid
        self._name = name
        self._regions: dict[int, Mapping] = {}
        self._cares: list[HugePageCare] = []

    @property
    def regions(self) -> int:
        """How many there are."""
        return len(self._regions)

    @property
    def size_bytes(self) -> int:
        """Of all regions."""
        return sum(region.size for region in list(self._regions.values()))

    def map(self, region: int, offset: int, size: int, fd: int) -> bool:
        """Is this memory mapped now? fd stays the caller's. Raises ProtocolError."""
        if region in self._regions:
            raise ProtocolError(f"region {region} twice")
        if len(self._regions) >= self._serve.client_regions:
            self._telemetry.count("serve_rejected_total", "client_regions")
            return False
        try:
            mapping = self._regions[region] = Mapping(fd, offset, size)
        except (OSError, ValueError) as error:
            log.warning("kvstrata: memory of process %d cannot be mapped: %s", self._pid, error)
            return False
        if self._serve.huge_pages:
            self._cares.append(
                HugePageCare(mapping, self._telemetry, "serve_huge_page_bytes_total", name=self._name)
            )
        return True

    def buffers(self, move: Move, *, loads: bool) -> Buffers:
        """The client's memory as this process sees it; it stays mapped until `close`."""
        addresses = np.zeros(len(move.keys), dtype=np.int64)
        lengths = move.lengths.copy()
        used = np.unique(move.regions)
        owners = []
        for region in used.tolist():
            mine = move.regions == region
            if region == NO_REGION and not loads:
                lengths[mine] = 0
                continue
            mapping = self._regions.get(region)
            if mapping is None:
                raise ProtocolError(f"region {region} is not registered")
            offsets, sizes = move.offsets[mine], lengths[mine]
            if (offsets < 0).any() or (sizes < 1).any() or (offsets > mapping.size - sizes).any():
                raise ProtocolError(f"a block outside region {region}")
            addresses[mine] = mapping.address + offsets
            owners.append(mapping)
        return Buffers(addresses, lengths, owners)

    def stop_care(self) -> None:
        """Nothing but transfers touches the memory any more. Waits for one step at most."""
        for care in self._cares:
            care.stop()
        for care in self._cares:
            care.join()

    def close(self) -> None:
        """Unmap it. All transfers must be over, whatever may still hold their buffers for a while."""
        for region in self._regions.values():
            region.close()
        self._regions.clear()
