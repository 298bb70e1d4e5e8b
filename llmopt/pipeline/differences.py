"""What separates two artifacts: how they were made, what was measured, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmopt.artifacts.outcome import Json
from llmopt.errors import CorruptError

if TYPE_CHECKING:
    from llmopt.artifacts.manifest import FileEntry, Manifest
    from llmopt.artifacts.store import Store

PARTS = ("inputs", "settings", "deps", "target")
_MOST_BYTES = 1 << 20  # of a JSON file that is looked into
_MOST_KEYS, _MOST_CHARACTERS = 50, 200  # told of each


def differences(store: Store, first: str, second: str) -> dict[str, Json]:
    """Of two full ids, as JSON: everything has `a` and `b`, and what is equal is left out."""
    a, b = store.get(first), store.get(second)
    return {"a": a.id, "b": b.id, "same": a.id == b.id, **compare(a, b), "files": _files(store, a, b)}


def compare(a: Manifest, b: Manifest) -> dict[str, Json]:
    """The manifests without their files."""
    found: dict[str, Json] = {}
    for name in ("kind", "status"):
        found[name] = _pair(getattr(a, name), getattr(b, name))
    for name in ("op", "op_version", "code"):
        found[name] = _pair(*(getattr(of.action, name, None) for of in (a, b)))
    for part in PARTS:
        found[part] = _pairs(*(getattr(of.action, part, {}) for of in (a, b)))
    found["metrics"] = _metrics(a.metrics, b.metrics)
    found["events"] = {
        "added": [event for event in b.events if event not in a.events],
        "removed": [event for event in a.events if event not in b.events],
    }
    return found


def file_lines(a: Manifest, b: Manifest) -> list[str]:
    """A line a file that is not the same in both."""
    changed, added, removed = _entries(a, b)
    lines = [f"{old.path}: other bytes, {old.size} -> {new.size}" for old, new in changed]
    lines += [f"{entry.path}: added, {entry.size} bytes" for entry in added]
    return sorted(lines + [f"{entry.path}: missing, {entry.size} bytes" for entry in removed])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted names; the pairs that settings make of a mapping are one too."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        inner = _mapping(value)
        found |= {name: value} if inner is None else flat(inner, f"{name}.")
    return found


def _mapping(value: Any) -> Mapping[str, Any] | None:
    """An empty mapping is a value of its own, or it would be lost."""
    if isinstance(value, dict):
        return value or None
    if isinstance(value, list) and value and all(isinstance(p, list) and len(p) == 2 for p in value):
        return {str(key): item for key, item in value} if all(isinstance(p[0], str) for p in value) else None
    return None


def _pair(a: Json, b: Json) -> Json:
    return None if _equal(a, b) else {"a": a, "b": b}


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Json]:
    old, new = flat(a), flat(b)
    names = sorted(old.keys() | new.keys())
    return {
        name: {"a": old.get(name), "b": new.get(name)} for name in names if not _equal(old.get(name), new.get(name))
    }


def _equal(a: Any, b: Any) -> bool:
    """1 and 1.0, and 1 and true, are not the same bytes of a manifest."""
    return type(a) is type(b) and a == b


def _metrics(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Json]:
    """With the difference `b` - `a`, and the ratio `b` / `a` where there is one."""
    found: dict[str, Json] = {}
    for name, pair in _pairs(a, b).items():
        assert isinstance(pair, dict)
        old, new = pair["a"], pair["b"]
        if _is_number(old) and _is_number(new):
            pair["difference"] = new - old  # type: ignore[operator]
            pair["ratio"] = new / old if old else None  # type: ignore[operator]
        found[name] = pair
    return found


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _entries(a: Manifest, b: Manifest) -> tuple[list[tuple[FileEntry, FileEntry]], list[FileEntry], list[FileEntry]]:
    """Changed, added, removed."""
    old, new = ({entry.path: entry for entry in of.files} for of in (a, b))
    return (
        [(entry, new[path]) for path, entry in old.items() if path in new and new[path].sha256 != entry.sha256],
        [entry for path, entry in new.items() if path not in old],
        [entry for path, entry in old.items() if path not in new],
    )


def _files(store: Store, a: Manifest, b: Manifest) -> dict[str, Json]:
    changed, added, removed = _entries(a, b)
    return {
        "added": [{"path": entry.path, "bytes": entry.size} for entry in added],
        "removed": [{"path": entry.path, "bytes": entry.size} for entry in removed],
        "changed": [
            {"path": old.path, "a": old.size, "b": new.size, **_keys(store, a, b, old, new)} for old, new in changed
        ],
    }


def _keys(store: Store, a: Manifest, b: Manifest, old: FileEntry, new: FileEntry) -> dict[str, Json]:
    """Which keys of a small JSON file are not the same; nothing where it is none."""
    if not old.path.endswith(".json") or max(old.size, new.size) > _MOST_BYTES:
        return {}
    try:
        values = [json.loads(store.read(of, old.path) or b"null") for of in (a, b)]
    except (ValueError, RecursionError, CorruptError):
        return {}
    if not all(isinstance(value, dict) for value in values):
        return {}
    before, after = (flat(value) for value in values)
    names = [name for name in sorted(before.keys() | after.keys()) if not _equal(before.get(name), after.get(name))]
    return {
        "keys": {name: {"a": _brief(before.get(name)), "b": _brief(after.get(name))} for name in names[:_MOST_KEYS]},
        "more_keys": max(0, len(names) - _MOST_KEYS),
    }


def _brief(value: Any) -> Json:
    """A long list or text is not told whole."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= _MOST_CHARACTERS:
        found: Json = value
        return found
    return f"{len(value)} items" if isinstance(value, list) else text[:_MOST_CHARACTERS] + "..."
