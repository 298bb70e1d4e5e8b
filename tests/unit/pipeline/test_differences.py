from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.artifacts.manifest import FileEntry, Manifest
from llmopt.artifacts.store import Store
from llmopt.pipeline.differences import compare, differences, file_lines, flat

Put = Callable[..., str]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
    max_leaves=10,
)
METRICS = st.dictionaries(st.text(min_size=1, max_size=5), VALUES, max_size=4)


@pytest.fixture
def put(store: Store, action: Callable[..., Any], tmp_path: Path) -> Put:
    def make(files: Mapping[str, str], *, events: tuple[str, ...] = (), **changes: Any) -> str:
        folder = tmp_path / f"staged{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return store.put(folder, kind="engine", action=action(**changes), events=events).id

    return make


def a_manifest(metrics: Mapping[str, Any]) -> Manifest:
    return Manifest(kind="report", files=(FileEntry("a", 1, "0" * 64),), metrics=metrics)


def test_only_what_is_not_the_same_is_told(store: Store, put: Put) -> None:
    first = put({"a": "1"}, deps={"torch": "2.0", "numpy": "2.0"}, events=("rounded", "both"))
    second = put({"a": "1"}, deps={"torch": "2.1", "numpy": "2.0"}, events=("both", "folded"))
    found = differences(store, first, second)
    assert found["deps"] == {"torch": {"a": "2.0", "b": "2.1"}}
    assert found["events"] == {"added": ["folded"], "removed": ["rounded"]}
    assert found["settings"] == found["inputs"] == found["target"] == {}
    assert found["files"] == {"added": [], "removed": [], "changed": []}


def test_a_small_json_file_is_looked_into_and_its_keys_are_bounded(store: Store, put: Put) -> None:
    first = put({"a.json": json.dumps({"x": {"y": 1, "z": 2}, "same": 0})})
    second = put({"a.json": json.dumps({"x": {"y": 3, "z": 2}, "same": 0, **{f"k{i:03}": i for i in range(99)}})})
    (changed,) = differences(store, first, second)["files"]["changed"]  # type: ignore[index,call-overload,misc]
    assert len(changed["keys"]) == 50
    assert changed["more_keys"] == 50
    assert changed["keys"]["k000"] == {"a": None, "b": 0}
    assert "x.z" not in changed["keys"]


def test_a_long_value_is_not_told_whole(store: Store, put: Put) -> None:
    first = put({"a.json": json.dumps({"list": list(range(500)), "text": "x" * 500, "short": [1]})})
    second = put({"a.json": json.dumps({"list": list(range(501)), "text": "y" * 500, "short": [2]})})
    (changed,) = differences(store, first, second)["files"]["changed"]  # type: ignore[index,call-overload,misc]
    assert changed["keys"]["list"] == {"a": "500 items", "b": "501 items"}
    assert changed["keys"]["text"]["a"] == "x" * 200 + "..."
    assert changed["keys"]["short"] == {"a": [1], "b": [2]}


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"text"', json.dumps({"a": "x" * (1 << 20)})])
def test_what_is_no_small_object_is_only_told_to_be_other(store: Store, put: Put, text: str) -> None:
    (changed,) = differences(store, put({"a.json": "{}"}), put({"a.json": text}))["files"]["changed"]  # type: ignore[index,call-overload,misc]
    assert changed.keys() == {"path", "a", "b"}


@given(METRICS)
def test_nothing_separates_a_manifest_from_itself(metrics: Mapping[str, Any]) -> None:
    found = compare(a_manifest(metrics), a_manifest(metrics))
    assert not any(value for name, value in found.items() if name != "events")
    assert file_lines(a_manifest(metrics), a_manifest(metrics)) == []


@given(METRICS, METRICS)
def test_the_other_way_round_the_same_is_told(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    forth, back = (compare(a_manifest(a), a_manifest(b))["metrics"] for a, b in ((one, other), (other, one)))
    assert isinstance(forth, dict)
    assert isinstance(back, dict)
    assert {name: (pair["a"], pair["b"]) for name, pair in forth.items()} == {  # type: ignore[index,call-overload]
        name: (pair["b"], pair["a"])  # type: ignore[index,call-overload]
        for name, pair in back.items()
    }


def test_numbers_have_a_difference_and_a_ratio_where_there_is_one() -> None:
    found = compare(a_manifest({"a": 2, "b": 0, "c": True}), a_manifest({"a": 3, "b": 1, "c": False}))["metrics"]
    assert found == {
        "a": {"a": 2, "b": 3, "difference": 1, "ratio": 1.5},
        "b": {"a": 0, "b": 1, "difference": 1, "ratio": None},
        "c": {"a": True, "b": False},
    }


def test_one_and_true_and_one_point_zero_are_not_the_same() -> None:
    assert compare(a_manifest({"a": 1}), a_manifest({"a": True}))["metrics"]
    assert compare(a_manifest({"a": 1}), a_manifest({"a": 1.0}))["metrics"]


def test_pairs_are_a_mapping_and_lists_are_not() -> None:
    assert flat({"a": [["x", 1], ["y", [["z", 2]]]], "b": [1, 2], "c": [], "d": {}}) == {
        "a.x": 1, "a.y.z": 2, "b": [1, 2], "c": [], "d": {}
    }  # fmt: skip
