"""The arena's rows as LMCache's memory objects."""

from __future__ import annotations

from typing import Any

from kvstrata.transfer.buffers import Arena
from peers.base import Shape


def memory_objects(arena: Arena, shape: Shape) -> list[Any]:
    """One object per block of the shape, on the arena's own bytes."""
    import torch  # noqa: PLC0415
    from lmcache.v1.memory_management import (  # noqa: PLC0415
        MemoryFormat,
        MemoryObjMetadata,
        TensorMemoryObj,
    )

    size = shape.block_bytes
    memory = torch.frombuffer(arena.view, dtype=torch.uint8)
    return [
        TensorMemoryObj(
            raw_data=memory[n * size : (n + 1) * size],
            metadata=MemoryObjMetadata(
                shape=torch.Size([size]),
                dtype=torch.uint8,
                address=n * size,
                phy_size=size,
                fmt=MemoryFormat.KV_2LTD,
                ref_count=1,
            ),
            parent_allocator=None,
        )
        for n in range(shape.blocks)
    ]
