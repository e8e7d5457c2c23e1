"""The frames: any split gives the same, garbage is an error and never anything else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.serving import protocol as p
from kvstrata.types import BlockKey, Lookup, Outcome

KINDS = st.sampled_from(list(p.Kind))
FRAMES = st.lists(
    st.tuples(KINDS, st.integers(0, 2**64 - 1), st.binary(max_size=200), st.integers(0, 2**16 - 1)),
    max_size=6,
)
UNPACKERS = [
    p.unpack_json, p.unpack_keys, p.unpack_move, p.unpack_touch, p.unpack_end, p.unpack_region,
    p.unpack_seconds, p.unpack_count, lambda data: p.unpack_states(data, 3),
    lambda data: p.unpack_outcomes(data, 3),
]  # fmt: skip


@given(FRAMES, st.lists(st.integers(1, 90), min_size=1, max_size=10))
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    frames: list[tuple[p.Kind, int, bytes, int]], cuts: list[int]
) -> None:
    stream = b"".join(p.pack(kind, number, payload, flags) for kind, number, payload, flags in frames)
    decoder, got, at, turn = p.FrameDecoder(), [], 0, 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        got += [(f.kind, f.number, f.payload, f.flags) for f in decoder.feed(stream[at : at + size])]
        at, turn = at + size, turn + 1
    assert got == frames


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_garbage_is_refused_or_waited_for_within_the_limit(pieces: list[bytes]) -> None:
    decoder, fed = p.FrameDecoder(limit_bytes=256), 0
    try:
        for piece in pieces:
            fed += len(piece)
            for frame in decoder.feed(piece):
                assert len(frame.payload) <= 256
    except p.ProtocolError:
        return
    assert len(decoder._held) <= min(fed, 256 + 16), "a frame is never longer than its limit"


@pytest.mark.parametrize("unpack", range(len(UNPACKERS)))
@given(data=st.binary(max_size=300))
def test_contents_that_are_garbage_are_a_protocol_error_and_nothing_else(unpack: int, data: bytes) -> None:
    try:
        UNPACKERS[unpack](data)
    except p.ProtocolError:
        return


@given(st.data())
def test_a_move_comes_out_as_it_went_in(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 20))
    words = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=count, max_size=count)
    move = p.Move(
        data.draw(st.integers(0, 2**64 - 1)),
        [BlockKey(data.draw(st.binary(min_size=32, max_size=32))) for _ in range(count)],
        np.array(data.draw(words), np.int64),
        np.array(data.draw(words), np.int64),
        np.array(data.draw(st.lists(st.integers(-1, 2**31 - 1), min_size=count, max_size=count)), np.int32),
        [BlockKey(bytes([number]) * 32) for number in range(data.draw(st.integers(0, 3)))],
    )
    got = p.unpack_move(p.pack_move(move))
    assert (got.request, got.keys, got.ahead) == (move.request, move.keys, move.ahead)
    for ours, theirs in (
        (got.offsets, move.offsets),
        (got.lengths, move.lengths),
        (got.regions, move.regions),
    ):
        assert ours.tolist() == theirs.tolist()
    whole = p.pack_move(move)
    for wrong in (whole[:-1], whole + b"\0"):
        with pytest.raises(p.ProtocolError):
            p.unpack_move(wrong)


def test_every_state_and_outcome_has_a_code() -> None:
    assert set(p.STATES) == set(Lookup) and set(p.OUTCOMES) == set(Outcome)
    assert p.unpack_outcomes(p.pack_outcomes(p.OUTCOMES), len(p.OUTCOMES)) == list(p.OUTCOMES)
    assert p.unpack_states(p.pack_states(p.STATES), len(p.STATES)) == list(p.STATES)


def test_the_largest_move_is_within_the_largest_frame_and_one_block_more_is_not() -> None:
    key = BlockKey(bytes(32))

    def move(blocks: int, ahead: int) -> bytes:
        zeros = np.zeros(blocks, np.int64)
        return p.pack_move(p.Move(1, [key] * blocks, zeros, zeros, zeros.astype(np.int32), [key] * ahead))

    assert len(move(p.FRAME_BLOCKS, p.AHEAD_BLOCKS)) == p.FRAME_BYTES
    for blocks, ahead in ((p.FRAME_BLOCKS + 1, 0), (1, p.AHEAD_BLOCKS + 1)):
        with pytest.raises(p.ProtocolError, match=f"{blocks} blocks"):
            p.unpack_move(move(blocks, ahead))
