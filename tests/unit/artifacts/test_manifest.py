"""A manifest is one text for one artifact, and nothing that could do harm is taken for one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.artifacts import Action, FileEntry, Manifest, canonical_json
from llmopt.errors import CorruptError, LlmoptError

DIGEST = "ab" * 32
MakeAction = Callable[..., Action]

texts = st.text(string.printable, max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(scalars | texts, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3))
mappings = st.dictionaries(texts, texts, max_size=3)
actions = st.builds(
    Action,
    op=st.from_regex(r"[a-z][a-z0-9.]{0,8}", fullmatch=True),
    op_version=st.integers(0, 99),
    inputs=mappings,
    settings=st.dictionaries(texts, json_values, max_size=4),
    code=texts,
    deps=mappings,
    target=mappings,
)


def manifest(*paths: str, **about: Any) -> Manifest:
    return Manifest(kind="model", files=tuple(FileEntry(path, 3, DIGEST) for path in paths or ("a",)), **about)


def edited(**changes: Any) -> bytes:
    """A manifest's bytes, in canonical form, with some of its fields changed."""
    return canonical_json({**json.loads(manifest().to_bytes()), **changes})


# -- canonical JSON


def test_keys_are_sorted_and_nothing_is_escaped_or_spaced() -> None:
    assert canonical_json({"b": [1, 1.0, None, True], "a": "ä"}) == '{"a":"ä","b":[1,1.0,null,true]}'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, "\ud800", {"a": [{"b": float("-inf")}]}])
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(LlmoptError):
        canonical_json(value)


def test_a_number_that_cannot_be_recorded_is_named_by_its_place() -> None:
    with pytest.raises(LlmoptError, match=r"`metrics.kl_mean` is nan"):
        manifest(metrics={"kl_mean": float("nan")}).to_bytes()


@given(st.dictionaries(texts, json_values))
@settings(deadline=None, max_examples=50)
def test_the_order_of_keys_changes_nothing(value: dict[str, Any]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


# -- actions


@given(actions, st.data())
@settings(deadline=None, max_examples=100)
def test_every_field_of_an_action_changes_its_key(action: Action, data: st.DataObject) -> None:
    other = data.draw(actions)
    for field in dataclasses.fields(Action):
        value = getattr(other, field.name)
        if canonical_json(value) != canonical_json(getattr(action, field.name)):
            assert dataclasses.replace(action, **{field.name: value}).key != action.key


@given(actions)
@settings(deadline=None, max_examples=50)
def test_an_action_survives_json(action: Action) -> None:
    assert Action.from_json(json.loads(canonical_json(action.to_json()))).key == action.key


@given(actions)
@settings(deadline=None, max_examples=50)
def test_the_order_of_a_mapping_changes_no_key(action: Action) -> None:
    turned: dict[str, Any] = {
        name: dict(reversed(getattr(action, name).items())) for name in ("inputs", "settings", "deps", "target")
    }
    assert dataclasses.replace(action, **turned).key == action.key


@pytest.mark.parametrize(
    ("one", "other"), [({"x": 1}, {"x": 1.0}), ({"x": 1}, {"x": True}), ({"x": "1"}, {"x": 1}), ({"x": None}, {})]
)
def test_settings_that_python_takes_for_equal_have_keys_of_their_own(
    make_action: MakeAction, one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert make_action(settings=one).key != make_action(settings=other).key


def test_a_name_moved_from_one_field_to_another_changes_the_key(make_action: MakeAction) -> None:
    here, there = make_action(inputs={"a": "b"}, deps={}), make_action(inputs={}, deps={"a": "b"})
    assert here.key != there.key


def test_an_action_with_another_key_than_its_own_is_refused(make_action: MakeAction) -> None:
    with pytest.raises(CorruptError, match="key"):
        Action.from_json({**make_action().to_json(), "key": "0" * 64})


# -- manifests


def test_the_id_is_the_digest_of_the_bytes() -> None:
    made = manifest()
    assert made.id == f"sha256:{hashlib.sha256(made.to_bytes()).hexdigest()}"
    assert made.size == 3


def test_a_manifest_survives_its_bytes(make_action: MakeAction) -> None:
    made = manifest("b", "a/c", action=make_action(), status="prepared", events=("x",), metrics={"kl": 0.1, "n": [1]})
    assert Manifest.from_bytes(made.to_bytes()) == made


def test_the_order_of_files_does_not_matter() -> None:
    assert manifest("b", "a", "c/d").id == manifest("c/d", "a", "b").id


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "other"},
        {"status": "prepared"},
        {"events": ("layer 3 rounded",)},
        {"metrics": {"kl": 0.5}},
        {"files": (FileEntry("a", 4, DIGEST),)},
        {"files": (FileEntry("b", 3, DIGEST),)},
        {"files": (FileEntry("a", 3, "cd" * 32),)},
    ],
)
def test_every_part_of_a_manifest_changes_the_id(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(manifest(), **changes).id != manifest().id


@pytest.mark.parametrize(
    "path",
    ["../a", "a/../b", "/etc/passwd", "a//b", "a/", "", ".", "./a", "..", "a\\b", "C:/a", "c:a", "a\0b", "a\nb", "\x7f",
     "x" * 256, "ä" * 128, "\udcff", "llmopt.json", "LLMOPT.JSON"],
)  # fmt: skip
def test_a_path_that_could_leave_the_folder_or_hide_is_refused(path: str) -> None:
    with pytest.raises(LlmoptError):
        manifest(path)


@pytest.mark.parametrize(
    "path", ["a", "a/b/c", ".hidden", "a b", "ä/ö", "..a", "a..", "x" * 255, "tokenizer/llmopt.json"]
)
def test_an_ordinary_path_is_taken(path: str) -> None:
    assert Manifest.from_bytes(manifest(path).to_bytes()).files[0].path == path


@pytest.mark.parametrize(
    "pair",
    [
        ("a", "a"),
        ("a", "A"),
        ("ä", "Ä"),
        ("\u00e4", "a\u0308"),
        ("ß", "ss"),
        ("a", "a/b"),
        ("A", "a/b"),
        ("d/x", "D/X"),
    ],
)
def test_paths_that_are_one_on_some_disk_are_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(LlmoptError):
        manifest(*pair)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        manifest().to_bytes() + b"\n",
        manifest().to_bytes().replace(b'":', b'": '),
        manifest().to_bytes().replace(b'"status"', b'"status":"complete","status"'),
        manifest().to_bytes().decode().encode("utf-16"),
        edited(extra=1),
        edited(schema="other/1"),
        edited(schema=None),
        edited(kind=""),
        edited(kind="A b"),
        edited(kind=1),
        edited(status=None),
        edited(files={}),
        edited(files=["a"]),
        edited(files=[{"path": "a", "size": 3}]),
        edited(files=[{"path": "a", "size": -1, "sha256": DIGEST}]),
        edited(files=[{"path": "a", "size": True, "sha256": DIGEST}]),
        edited(files=[{"path": "a", "size": 3.0, "sha256": DIGEST}]),
        edited(files=[{"path": "a", "size": 3, "sha256": DIGEST.upper()}]),
        edited(files=[{"path": "a", "size": 3, "sha256": DIGEST[:-1]}]),
        edited(files=[{"path": "a", "size": 3, "sha256": DIGEST, "mode": 7}]),
        edited(files=[{"path": "../a", "size": 3, "sha256": DIGEST}]),
        edited(files=[{"path": "/a", "size": 3, "sha256": DIGEST}]),
        edited(files=[{"path": p, "size": 3, "sha256": DIGEST} for p in ("b", "a")]),
        edited(files=[{"path": p, "size": 3, "sha256": DIGEST} for p in ("A", "a")]),
        edited(action={}),
        edited(action="x"),
        edited(events=[1]),
        edited(events="x"),
        edited(metrics=[]),
        edited().replace(b'"metrics":{}', b'"metrics":{"x":NaN}'),
        edited().replace(b'"metrics":{}', b'"metrics":{"x":1e999}'),
        b" " * ((16 << 20) + 1),
    ],
)
def test_whatever_is_not_a_manifest_byte_for_byte_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptError):
        Manifest.from_bytes(data)


def test_a_field_of_an_action_that_is_missing_or_too_much_is_refused(make_action: MakeAction) -> None:
    whole = json.loads(manifest(action=make_action()).to_bytes())
    for name in whole["action"]:
        less = {key: value for key, value in whole["action"].items() if key != name}
        with pytest.raises(CorruptError):
            Manifest.from_bytes(canonical_json({**whole, "action": less}))
    with pytest.raises(CorruptError):
        Manifest.from_bytes(canonical_json({**whole, "action": {**whole["action"], "host": "x"}}))


def test_a_later_schema_says_to_upgrade() -> None:
    with pytest.raises(LlmoptError, match=r"llmopt.artifact/2") as caught:
        Manifest.from_bytes(edited(schema="llmopt.artifact/2"))
    assert caught.value.hint == "upgrade llmopt"


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_random_bytes_are_never_a_manifest_nor_a_crash(data: bytes) -> None:
    with pytest.raises(CorruptError):
        Manifest.from_bytes(data)
