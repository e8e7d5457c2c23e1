"""Our columns: whatever is written comes back, at any batch size; and no damaged file gets through."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_kit import assert_same, assert_sound, renamed

from kvstrata.errors import TraceFormatError
from kvstrata.traces import mooncake, parquet
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.parquet import METADATA_KEY, ParquetTrace, ParquetWriter, write_parquet
from kvstrata.traces.trace import Trace

SAMPLE = Path(__file__).parents[1] / "data" / "mooncake_conversation_300.jsonl"

chains = st.integers(0, 5).flatmap(
    lambda root: st.integers(0, 5).map(lambda length: [10 * root + depth for depth in range(length)])
)
requests = st.fixed_dictionaries(
    {
        "time_s": st.integers(0, 5).map(float),
        "blocks": chains,
        "session": st.one_of(st.none(), st.integers(0, 3)),
        "tenant": st.one_of(st.none(), st.integers(0, 3)),
        "input_tokens": st.one_of(st.none(), st.integers(0, 2**53)),
        "model": st.one_of(st.none(), st.sampled_from(["m", "", "ü\n"])),
        "stop": st.one_of(st.none(), st.sampled_from(["end_turn", "tool_use"])),
    }
)


def build(rows: list[dict[str, Any]]) -> Trace:
    builder = TraceBuilder("name", "format", 16, 1000)
    for row in rows:
        builder.add(**row)
    return builder.build(skipped=3)


def small(rows: int = 40) -> Trace:
    return build(
        [
            {"time_s": n / 3, "blocks": [n % 7, 100 + n % 7, 200 + n], "session": n % 3, "model": "m"}
            for n in range(rows)
        ]
    )


@given(st.lists(requests, min_size=1, max_size=12), st.integers(1, 40), st.integers(1, 30))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], max_accesses: int, group: int
) -> None:
    trace = build(rows)
    path = tmp_path_factory.mktemp("t") / "t.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROW_GROUP_ROWS", group)
        write_in_pieces(trace, path, max_accesses)
        assert_same(trace, ParquetTrace(path), max_accesses)
    assert_same(trace, ParquetTrace(path), max_accesses)


def write_in_pieces(trace: Trace, path: Path, max_accesses: int, spread: int = 1, **options: Any) -> None:
    """Through the writer, a few requests at a time; spread multiplies the ids, which are then not dense."""
    head = trace.head
    about = {name: getattr(head, name) for name in ("name", "source_format", "block_tokens", "block_bytes")}
    with ParquetWriter(path, **{"dense": True, **about, "skipped": head.skipped, **options}) as writer:
        for batch in trace.batches(max_accesses):
            writer.append(
                starts=batch.starts,
                blocks=batch.ids.astype(np.uint64) * np.uint64(spread),
                parents=batch.parents.astype(np.uint64) * np.uint64(spread),
                depths=batch.depths,
                sizes=batch.sizes,
                time_s=batch.time_s,
                session=batch.session,
                tenant=batch.tenant,
                features=batch.features,
                labels=head.labels,
            )


@given(st.lists(requests, min_size=1, max_size=12), st.integers(1, 40), st.integers(1, 30))
def test_64_bit_ids_become_dense(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], max_accesses: int, group: int
) -> None:
    trace = build(rows)
    path = tmp_path_factory.mktemp("t") / "t.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROW_GROUP_ROWS", group)
        write_in_pieces(trace, path, max_accesses, spread=0x9E3779B97F4A7C15, dense=False)
        assert_same(trace, ParquetTrace(path), max_accesses)


def test_a_real_trace(tmp_path: Path) -> None:
    trace = mooncake.read(SAMPLE)
    write_parquet(trace, tmp_path / "t.parquet")
    for max_accesses in (1, 1000, 10**9):
        assert_same(trace, ParquetTrace(tmp_path / "t.parquet"), max_accesses)
    assert_sound(trace)
    assert list(tmp_path.iterdir()) == [tmp_path / "t.parquet"]


def test_rows_are_accesses_that_others_can_read(tmp_path: Path) -> None:
    trace = build([{"time_s": 1, "blocks": [8, 9], "model": "m"}, {"time_s": 3, "blocks": []}])
    write_parquet(trace, tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet").to_pydict()
    assert table["time_s"] == [0, 0, 2] and table["request"] == [0, 0, 1]
    assert table["block"] == [0, 1, None] and table["parent"] == [None, 0, None]
    assert table["depth"] == [0, 1, None] and table["size"] == [1000, 1000, None]
    assert table["session"] == [None] * 3 and table["output_tokens"] == [None] * 3
    assert table["model"] == ["m", "m", None]


def test_row_groups_hold_whole_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 10)
    write_in_pieces(small(), tmp_path / "t", max_accesses=1)
    file = pq.ParquetFile(tmp_path / "t")
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert sizes == [9] * 13 + [3]
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_the_first_time_is_the_start(tmp_path: Path) -> None:
    trace = small()
    later = Trace(
        **{name: getattr(trace, name) for name in Trace.__slots__} | {"time_s": trace.time_s + 2**30}
    )
    write_parquet(later, tmp_path / "t")
    times = np.concatenate([batch.time_s for batch in ParquetTrace(tmp_path / "t").batches(7)])
    assert times == pytest.approx(trace.time_s)


def test_other_sizes_on_request(tmp_path: Path) -> None:
    write_parquet(small(), tmp_path / "t")
    source = ParquetTrace(tmp_path / "t", block_bytes=77)
    assert source.head.block_bytes == 77
    assert all((batch.sizes == 77).all() for batch in source.batches())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"old")

    def fail(done: int, total: int) -> None:
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_parquet(small(), path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with (
        pytest.raises(TraceFormatError, match="no requests"),
        ParquetWriter(path, name="x", source_format="y"),
    ):
        pass
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def damaged(path: Path, match: str) -> None:
    with pytest.raises(TraceFormatError, match=match) as error:
        for _ in ParquetTrace(path).batches():
            pass
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [4, 8, 100, 1000, -1, -8, -500])
def test_cut_off(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "t.parquet"
    write_parquet(small(), path)
    path.write_bytes(path.read_bytes()[:keep])
    damaged(path, "damaged or cut off")


def test_any_changed_byte_of_data_is_noticed(tmp_path: Path) -> None:
    """Pages have checksums; what lies between them (headers, the footer) fails or says the same."""
    path = tmp_path / "t.parquet"
    trace = small()
    write_parquet(trace, path)
    good = path.read_bytes()
    noticed = 0
    places = range(4, len(good) - 8, 97)
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        try:
            batches = list(ParquetTrace(path).batches())
        except TraceFormatError:
            noticed += 1
        else:
            assert np.concatenate([batch.ids for batch in batches]).tolist() == trace.ids.tolist()
    assert noticed > len(places) // 4


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table], **options: Any) -> None:
    about = pq.read_metadata(path).metadata[METADATA_KEY]
    table = pq.read_table(path).replace_schema_metadata({METADATA_KEY: about})
    pq.write_table(change(table), path, **options)


def with_column(name: str, values: Callable[[np.ndarray], Any]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        field = table.schema.field(name)
        column = values(table.column(name).fill_null(-1).to_numpy())
        return table.set_column(place, field, pa.array(column, field.type))

    return change


def with_about(**changes: object) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        about = {**json.loads(table.schema.metadata[METADATA_KEY]), **changes}
        return table.replace_schema_metadata({METADATA_KEY: json.dumps(about)})

    return change


def put(place: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(column: np.ndarray) -> np.ndarray:
        column = column.copy()
        column[place] = value
        return column

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda table: table.replace_schema_metadata({}), "no trace of ours"),
        (lambda table: table.drop_columns(["depth", "size"]), "columns depth, size are missing"),
        (lambda table: table.set_column(0, "time_s", table.column("request")), "column time_s is int64"),
        (lambda table: table.slice(0, 60), "it holds 20 requests"),
        (with_about(version=2), "version 2 of the format; this kvstrata reads version 1"),
        (with_about(version="1"), "version is '1'"),
        (with_about(requests=None), "no requests"),
        (with_about(unique=2**40), "unique is"),
        (with_about(labels=[1]), "JSON object"),
        (with_about(labels={"model": ["other"]}), "unknown label"),
        (with_about(requests=41), "it holds 40 requests"),
        (with_column("time_s", put(5, -1.0)), "times do not ascend"),
        (with_column("time_s", put(5, np.nan)), "times do not ascend"),
        (with_column("request", put(5, 30)), "requests are not in order"),
        (with_column("request", put(0, -5)), "requests are not in order"),
        (with_column("size", put(4, -7)), "no size"),
        (with_column("block", put(4, 10**6)), "block ids"),
        (with_column("block", put(4, -2)), "block ids"),
        (with_column("block", put(0, 1)), "block ids"),
        (with_column("parent", put(4, 53)), "parent"),
        (with_column("parent", put(4, -1)), "parent"),
        (with_column("parent", put(4, -9)), "parent"),
    ],
)
def test_a_changed_file(tmp_path: Path, change: Callable[[pa.Table], pa.Table], match: str) -> None:
    write_parquet(small(), tmp_path / "t")
    rewritten(tmp_path / "t", change)
    damaged(tmp_path / "t", match)


def test_what_another_tool_wrote_again_is_the_same(tmp_path: Path) -> None:
    """Row groups may then cut requests in two."""
    trace = small()
    write_parquet(trace, tmp_path / "t")
    rewritten(tmp_path / "t", lambda table: table, row_group_size=4)
    assert_same(trace, ParquetTrace(tmp_path / "t"), 7)


def test_an_unknown_parent_of_64_bits(tmp_path: Path) -> None:
    trace = small()
    write_in_pieces(renamed(trace), tmp_path / "t", 10, spread=3, dense=False)
    rewritten(tmp_path / "t", with_column("parent", put(4, 1)))
    damaged(tmp_path / "t", "parent is not in the trace")


def test_not_parquet_and_not_there(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"PAR1 and then something else")
    damaged(tmp_path / "t", "damaged")
    with pytest.raises(FileNotFoundError):
        ParquetTrace(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        ParquetTrace(tmp_path)


def test_without_pyarrow_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from kvstrata.errors import ConfigError\n"
        "import kvstrata.traces.open\n"
        "try:\n    import kvstrata.traces.parquet\n"
        "except ConfigError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'kvstrata[traces]'" in done.stdout


def test_the_other_readers_load_no_pyarrow() -> None:
    code = "import sys, kvstrata.traces.open; print('pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
