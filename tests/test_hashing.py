"""Keys and namespaces: published vectors, an independent BLAKE3, and the promises that keys make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvstrata.hashing import Extras, canonical, chain_keys, namespace_digest, wrap_keys
from kvstrata.types import KEY_BYTES
from reference.blake3_reference import blake3_derive_key, blake3_hash, blake3_keyed

VECTORS_FILE = Path(__file__).parent / "data" / "key_vectors.json"
VECTORS: dict[str, Any] = json.loads(VECTORS_FILE.read_text())

NAMESPACE = namespace_digest({"model": "m"})

tokens = st.integers(0, 2**32 - 1)
prompts = st.lists(tokens, max_size=40)
tagged = st.lists(
    st.tuples(st.text(st.characters(codec="ascii"), max_size=5), st.binary(max_size=5)), max_size=3
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
field_sets = st.dictionaries(st.text(max_size=5), json_values, max_size=4)


def prompt_of(vector: dict[str, Any]) -> list[int]:
    written = vector["tokens"]
    return list(range(written["range"])) if isinstance(written, dict) else written


def extras_of(vector: dict[str, Any]) -> dict[int, Extras]:
    return {
        int(block): [(tag, bytes.fromhex(value)) for tag, value in pairs]
        for block, pairs in vector["extras"].items()
    }


# Published vectors


@pytest.mark.parametrize("vector", VECTORS["namespaces"], ids=range(len(VECTORS["namespaces"])))
def test_namespace_vectors(vector: dict[str, Any]) -> None:
    assert canonical(vector["fields"]).decode() == vector["canonical"]
    digest = namespace_digest(vector["fields"], bytes.fromhex(vector["salt_hex"]))
    assert digest.hex() == vector["namespace"]


@pytest.mark.parametrize("vector", VECTORS["chains"], ids=range(len(VECTORS["chains"])))
def test_chain_vectors(vector: dict[str, Any]) -> None:
    namespace = bytes.fromhex(vector["namespace"])
    keys = chain_keys(namespace, prompt_of(vector), vector["block_tokens"], extras_of(vector))
    assert [key.hex() for key in keys] == vector["keys"]


@pytest.mark.parametrize("vector", VECTORS["wrapped"], ids=range(len(VECTORS["wrapped"])))
def test_wrap_vectors(vector: dict[str, Any]) -> None:
    engine_keys = [bytes.fromhex(key) for key in vector["engine_keys"]]
    keys = wrap_keys(bytes.fromhex(vector["namespace"]), engine_keys)
    assert [key.hex() for key in keys] == vector["keys"]


@pytest.mark.parametrize("vector", VECTORS["blake3"]["vectors"], ids=lambda v: str(v["input_len"]))
def test_official_blake3_vectors(vector: dict[str, Any]) -> None:
    """They pin the library, and the reference that the tests below rely on."""
    data = bytes(n % 251 for n in range(vector["input_len"]))
    key, context = VECTORS["blake3"]["key"].encode(), VECTORS["blake3"]["context"]
    assert blake3(data).hexdigest() == blake3_hash(data).hex() == vector["hash"]
    assert blake3(data, key=key).hexdigest() == blake3_keyed(key, data).hex() == vector["keyed_hash"]
    derived = blake3(data, derive_key_context=context).hexdigest()
    assert derived == blake3_derive_key(context, data).hex() == vector["derive_key"]


def test_the_empty_hash_is_the_well_known_one() -> None:
    known = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert blake3_hash(b"").hex() == blake3(b"").hexdigest() == known


# An independent computation


def slow_keys(
    namespace: bytes, prompt: list[int], block_tokens: int, extras: dict[int, Extras]
) -> list[bytes]:
    """The formula in the docstring of `kvstrata.hashing`, word by word."""
    keys, key = [], namespace
    for block in range(len(prompt) // block_tokens):
        data = b""
        for token in prompt[block * block_tokens : (block + 1) * block_tokens]:
            data += token.to_bytes(4, "little")
        for tag, value in extras.get(block, ()):
            data += bytes([len(tag.encode())]) + tag.encode() + len(value).to_bytes(4, "little") + value
        key = blake3_keyed(key, data)
        keys.append(key)
    return keys


@given(
    prompt=prompts,
    block_tokens=st.integers(1, 12),
    extras=st.dictionaries(st.integers(0, 8), tagged, max_size=3),
)
def test_keys_are_the_formula(prompt: list[int], block_tokens: int, extras: dict[int, Extras]) -> None:
    expected = slow_keys(NAMESPACE, prompt, block_tokens, extras)
    assert chain_keys(NAMESPACE, prompt, block_tokens, extras) == expected


@pytest.mark.parametrize("block_tokens", [16, 255, 256, 257, 600, 2_000])
def test_large_blocks_are_the_formula(block_tokens: int) -> None:
    """Above 256 tokens a block is more than one BLAKE3 chunk."""
    prompt = np.random.default_rng(block_tokens).integers(0, 2**32, 2 * block_tokens + 3).tolist()
    assert chain_keys(NAMESPACE, prompt, block_tokens) == slow_keys(NAMESPACE, prompt, block_tokens, {})


@given(fields=field_sets, salt=st.binary(max_size=20), engine_key=st.binary(max_size=70))
def test_namespaces_and_wrapped_keys_are_the_formula(
    fields: dict[str, Any], salt: bytes, engine_key: bytes
) -> None:
    text = canonical(fields)
    if salt:
        expected = blake3_keyed(blake3_derive_key("kvstrata 2026 tenant salt v1", salt), text)
    else:
        expected = blake3_derive_key("kvstrata 2026 namespace v1", text)
    assert namespace_digest(fields, salt) == expected
    assert wrap_keys(expected, [engine_key]) == [blake3_keyed(expected, engine_key)]


@pytest.mark.parametrize("hash_seed", ["0", "1", "4242", "random"])
def test_keys_are_the_same_in_every_process(hash_seed: str) -> None:
    code = """
import json, sys
from kvstrata.hashing import chain_keys, namespace_digest, wrap_keys
v = json.load(sys.stdin)
out = []
for n in v["namespaces"]:
    fields = dict(reversed(list(n["fields"].items())))
    out.append(namespace_digest(fields, bytes.fromhex(n["salt_hex"])).hex())
for c in v["chains"]:
    t = c["tokens"] if isinstance(c["tokens"], list) else range(c["tokens"]["range"])
    extras = {int(b): [(tag, bytes.fromhex(x)) for tag, x in p] for b, p in c["extras"].items()}
    out += [k.hex() for k in chain_keys(bytes.fromhex(c["namespace"]), list(t), c["block_tokens"], extras)]
for w in v["wrapped"]:
    keys = map(bytes.fromhex, w["engine_keys"])
    out += [k.hex() for k in wrap_keys(bytes.fromhex(w["namespace"]), keys)]
print(json.dumps(out))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=VECTORS_FILE.read_text(),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
    )
    expected = [vector["namespace"] for vector in VECTORS["namespaces"]]
    for kind in ("chains", "wrapped"):
        expected += [key for vector in VECTORS[kind] for key in vector["keys"]]
    assert json.loads(done.stdout) == expected


# What keys promise


@given(prompt=prompts, block_tokens=st.integers(1, 8), cut=st.integers(0, 40))
def test_a_prefix_of_tokens_gives_a_prefix_of_keys(prompt: list[int], block_tokens: int, cut: int) -> None:
    keys = chain_keys(NAMESPACE, prompt, block_tokens)
    assert len(keys) == len(prompt) // block_tokens
    assert len(set(keys)) == len(keys)
    assert all(len(key) == KEY_BYTES for key in keys)
    shorter = chain_keys(NAMESPACE, prompt[:cut], block_tokens)
    assert keys[: len(shorter)] == shorter


@given(
    prompt=st.lists(tokens, min_size=1, max_size=40),
    block_tokens=st.integers(1, 8),
    where=st.integers(0, 39),
    other=tokens,
)
def test_a_changed_token_changes_its_key_and_all_later_ones(
    prompt: list[int], block_tokens: int, where: int, other: int
) -> None:
    where %= len(prompt)
    assume(other != prompt[where])
    changed = [*prompt[:where], other, *prompt[where + 1 :]]
    before = chain_keys(NAMESPACE, prompt, block_tokens)
    after = chain_keys(NAMESPACE, changed, block_tokens)
    block = where // block_tokens
    assert before[:block] == after[:block]
    assert not set(before[block:]) & set(after)


@given(one=st.lists(tagged, min_size=2, max_size=2), other=st.lists(tagged, min_size=2, max_size=2))
def test_different_extras_give_different_keys(one: list[Extras], other: list[Extras]) -> None:
    prompt = [1, 2, 3, 4]
    first = chain_keys(NAMESPACE, prompt, 2, dict(enumerate(one)))
    second = chain_keys(NAMESPACE, prompt, 2, dict(enumerate(other)))
    same = next((n for n in range(2) if list(one[n]) != list(other[n])), 2)
    assert first[:same] == second[:same]
    assert not set(first[same:]) & set(second[same:])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([("ab", b"c")], [("a", b"bc")]),
        ([("a", b""), ("b", b"")], [("a", b"\x01b\x00\x00\x00\x00")]),
        ([("a", b"1"), ("b", b"2")], [("b", b"2"), ("a", b"1")]),
        ([("a", b"1")], [("a", b"1"), ("a", b"1")]),
        ([("a", b"")], []),
    ],
)
def test_extras_that_look_alike_are_kept_apart(one: Extras, other: Extras) -> None:
    assert chain_keys(NAMESPACE, [7], 1, {0: one}) != chain_keys(NAMESPACE, [7], 1, {0: other})


def test_extras_cannot_pass_for_tokens() -> None:
    """A shorter block with extras is not a longer block, because the block size is in the namespace."""
    two = chain_keys(namespace_digest({"block_tokens": 2}), [1, 2, 3, 4], 2, {0: [("x", b"y")]})
    four = chain_keys(namespace_digest({"block_tokens": 4}), [1, 2, 3, 4], 4)
    assert not set(two) & set(four)


@given(
    fields=field_sets,
    prompt=st.lists(tokens, min_size=4, max_size=20),
    salt=st.binary(min_size=1, max_size=9),
)
def test_a_salt_changes_everything(fields: dict[str, Any], prompt: list[int], salt: bytes) -> None:
    plain, salted = namespace_digest(fields), namespace_digest(fields, salt)
    assert plain != salted
    assert namespace_digest(fields, salt + b"!") not in (plain, salted)
    assert not set(chain_keys(plain, prompt, 2)) & set(chain_keys(salted, prompt, 2))
    assert not set(wrap_keys(plain, [b"k"])) & set(wrap_keys(salted, [b"k"]))


@settings(max_examples=200)
@given(one=field_sets, other=field_sets)
def test_different_fields_give_different_namespaces(one: dict[str, Any], other: dict[str, Any]) -> None:
    # JSON tells True from 1, which Python's == does not.
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (namespace_digest(one) == namespace_digest(other)) == same


@given(fields=field_sets)
def test_the_order_of_fields_does_not_matter(fields: dict[str, Any]) -> None:
    assert canonical(fields) == canonical(dict(reversed(list(fields.items()))))
    assert canonical(fields).isascii()
    assert json.loads(canonical(fields)) == fields


def test_true_is_not_one_and_text_is_not_a_number() -> None:
    digests = {namespace_digest({"a": value}) for value in (True, 1, "1", None, "", [1], [[1]], {"1": 1})}
    assert len(digests) == 8


# What is refused


@pytest.mark.parametrize(
    "fields",
    [
        {"a": 1.0},
        {"a": float("nan")},
        {"a": [1, [2.5]]},
        {"a": {"b": 0.5}},
        {"a": b"bytes"},
        {"a": object()},
        {"a": {1, 2}},
        {1: "a"},
        {"a": {2: "b"}},
        {"a": np.int64(3)},
    ],
    ids=lambda fields: "an object" if "object at" in repr(fields) else repr(fields),
)
def test_what_has_no_one_encoding_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="namespace"):
        canonical(fields)


@pytest.mark.parametrize(
    "prompt",
    [[-1], [2**32], [0, -5], [2**63], [2**64], np.array([-1], np.int8), [1.5], [float("nan")], ["a"]],
    ids=repr,
)
def test_a_token_outside_the_range_is_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"token ids must be integers in \[0, 2\*\*32\)"):
        chain_keys(NAMESPACE, prompt, 1)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one-dimensional"):
        chain_keys(NAMESPACE, np.array([[1, 2], [3, 4]]), 2)
    for block_tokens in (0, -1):
        with pytest.raises(ValueError, match="block_tokens"):
            chain_keys(NAMESPACE, [1, 2], block_tokens)
    with pytest.raises(ValueError):
        chain_keys(b"short", [1, 2], 1)


@pytest.mark.parametrize("dtype", ["<u4", ">u4", "i4", "i8", "u8", "<u2", "u1"])
def test_the_type_of_the_tokens_does_not_matter(dtype: str) -> None:
    prompt = [0, 1, 99, 255, 7]
    assert chain_keys(NAMESPACE, np.array(prompt, dtype), 2) == chain_keys(NAMESPACE, prompt, 2)
    strided = np.array([0, 9, 1, 9, 99, 9, 255, 9, 7, 9], dtype)[::2]
    assert chain_keys(NAMESPACE, strided, 2) == chain_keys(NAMESPACE, prompt, 2)


def test_an_empty_or_partial_prompt_has_no_keys() -> None:
    assert chain_keys(NAMESPACE, [], 4) == []
    assert chain_keys(NAMESPACE, [1, 2, 3], 4) == []
    assert wrap_keys(NAMESPACE, []) == []
