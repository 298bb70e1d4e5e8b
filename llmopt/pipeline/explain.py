"""Why an action is not in the store: what separates it from the nearest one that is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llmopt.pipeline.history import OPERATIONS

if TYPE_CHECKING:
    from llmopt.artifacts.manifest import Action, Manifest
    from llmopt.artifacts.store import Store


def explain(store: Store, action: Action) -> tuple[str, ...]:
    """One line a field, as `settings.bits: 4 -> 3`; or that the store has no such operation at all."""
    return nearest_difference(action, store.actions(action.op))


def distinct_results(store: Store, action: Action | None) -> tuple[str, ...]:
    """The ids of an action's results where they are several, which says that it is not reproducible; else none.

    A measurement is meant to give another result each time.
    """
    if action is None or action.op in OPERATIONS:
        return ()
    results = store.results(action.key)
    return tuple(results) if len(results) > 1 else ()


def different_results(manifests: Iterable[Manifest]) -> dict[str, int]:
    """By the id of each artifact, how many different results its action has among these; 0 for one that is alone."""
    by_key: dict[str, list[str]] = {}
    found: dict[str, int] = {}
    for manifest in manifests:
        found[manifest.id] = 0
        if manifest.action is not None and manifest.action.op not in OPERATIONS:
            by_key.setdefault(manifest.action.key, []).append(manifest.id)
    for ids in by_key.values():
        found |= dict.fromkeys(ids, len(ids) if len(ids) > 1 else 0)
    return found


def nearest_difference(action: Action, stored: Iterable[Action]) -> tuple[str, ...]:
    candidates = [difference(other, action) for other in stored]
    if not candidates:
        return (f"no result of `{action.op}` is in the store",)
    return min(candidates, key=len)


def difference(before: Action, after: Action) -> tuple[str, ...]:
    """The fields that differ, in the order of their names."""
    old, new = _flat(before), _flat(after)
    return tuple(
        f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


def _flat(action: Action) -> dict[str, Any]:
    parts = {"inputs": action.inputs, "settings": action.settings, "deps": action.deps, "target": action.target}
    fields = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return fields | {"op_version": action.op_version, "code": action.code}


def _short(value: Any) -> str:
    text = "(none)" if value is None else str(value)
    return text[:19] + "..." if text.startswith("sha256:") else text
