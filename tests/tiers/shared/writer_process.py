"""A member in a process of its own: saves chains of blocks until it is killed.

Arguments: folder, a number for its chains, then keys of the tier's configuration. After each flush it
prints how many chains are published. With chains=<n> it stops after so many, prints "done" and waits for
the end of its input.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fs_kit import open_shared

from kvstrata.types import Outcome
from store_kit import chain, save

BLOCKS = 20


def main(folder: str, number: int, fields: dict[str, int]) -> None:
    chains = fields.pop("chains", 1 << 62)
    flush_each = fields.pop("flush_each", 1)
    with open_shared(Path(folder), **fields) as store:
        for count in range(1, chains + 1):
            keys = chain(number * 1_000_000 + count, BLOCKS)
            while set(save(store, keys)) & {Outcome.REJECTED}:
                time.sleep(0.01)
            if count % flush_each == 0:
                assert store.flush()
                print(count, flush=True)
        print("done", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(
        sys.argv[1],
        int(sys.argv[2]),
        {name: int(value) for name, _, value in (each.partition("=") for each in sys.argv[3:])},
    )
