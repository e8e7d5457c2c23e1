"""BLAKE3 from its specification, slow and plain: hash, keyed hash and key derivation, 32 bytes out.

O'Connor, Aumasson, Neves, Wilcox-O'Hearn, "BLAKE3: one function, fast everywhere", 2021, sections 2.1
to 2.6. The input is cut into chunks of 1024 bytes; chunks are leaves of a binary tree whose left
subtrees are complete and as large as possible.
"""

from __future__ import annotations

IV = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
KEYED_HASH, DERIVE_KEY_CONTEXT, DERIVE_KEY_MATERIAL = 16, 32, 64
CHUNK_BYTES, BLOCK_BYTES = 1024, 64

Words = tuple[int, ...]


def _rotate_right(word: int, bits: int) -> int:
    return (word >> bits | word << (32 - bits)) & 0xFFFFFFFF


def _mix(v: list[int], a: int, b: int, c: int, d: int, x: int, y: int) -> None:
    """The function G."""
    for message, first, second in ((x, 16, 12), (y, 8, 7)):
        v[a] = (v[a] + v[b] + message) & 0xFFFFFFFF
        v[d] = _rotate_right(v[d] ^ v[a], first)
        v[c] = (v[c] + v[d]) & 0xFFFFFFFF
        v[b] = _rotate_right(v[b] ^ v[c], second)


def _compress(chaining: Words, block: bytes, counter: int, length: int, flags: int) -> Words:
    """The first eight words of the compression function's output."""
    padded = block.ljust(BLOCK_BYTES, b"\0")
    m = [int.from_bytes(padded[i : i + 4], "little") for i in range(0, BLOCK_BYTES, 4)]
    v = [*chaining, *IV[:4], counter & 0xFFFFFFFF, counter >> 32, length, flags]
    for _ in range(7):
        for column in range(4):
            _mix(v, column, 4 + column, 8 + column, 12 + column, m[2 * column], m[2 * column + 1])
        for n in range(4):
            _mix(v, n, 4 + (n + 1) % 4, 8 + (n + 2) % 4, 12 + (n + 3) % 4, m[8 + 2 * n], m[9 + 2 * n])
        m = [m[place] for place in PERMUTATION]
    return tuple(v[n] ^ v[n + 8] for n in range(8))


def _to_bytes(words: Words) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


def _chunk(key: Words, data: bytes, counter: int, flags: int, root: int) -> Words:
    chaining = key
    blocks = [data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES)] or [b""]
    for number, block in enumerate(blocks):
        extra = CHUNK_START if number == 0 else 0
        if number == len(blocks) - 1:
            extra |= CHUNK_END | root
        chaining = _compress(chaining, block, counter, len(block), flags | extra)
    return chaining


def _tree(key: Words, data: bytes, counter: int, flags: int, root: int) -> Words:
    if len(data) <= CHUNK_BYTES:
        return _chunk(key, data, counter, flags, root)
    left_chunks = 1
    while 2 * left_chunks * CHUNK_BYTES < len(data):
        left_chunks *= 2
    split = left_chunks * CHUNK_BYTES
    left = _tree(key, data[:split], counter, flags, 0)
    right = _tree(key, data[split:], counter + left_chunks, flags, 0)
    return _compress(key, _to_bytes(left + right), 0, BLOCK_BYTES, flags | PARENT | root)


def _words(key: bytes) -> Words:
    assert len(key) == 32
    return tuple(int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4))


def blake3_hash(data: bytes) -> bytes:
    return _to_bytes(_tree(IV, data, 0, 0, ROOT))


def blake3_keyed(key: bytes, data: bytes) -> bytes:
    return _to_bytes(_tree(_words(key), data, 0, KEYED_HASH, ROOT))


def blake3_derive_key(context: str, material: bytes) -> bytes:
    context_key = _tree(IV, context.encode(), 0, DERIVE_KEY_CONTEXT, ROOT)
    return _to_bytes(_tree(context_key, material, 0, DERIVE_KEY_MATERIAL, ROOT))
