"""What an artifact was made from, back to the checkpoint, with what was measured of each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from llmopt.artifacts import licenses
from llmopt.artifacts.outcome import Json
from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.manifest import Action, Manifest
    from llmopt.artifacts.store import Store

#: The input that an artifact is a form of.
_PARENTS = ("prepared", "model")
#: Of an evaluation, what a reader of another report wants to see.
_QUALITY = ("perplexity", "base_perplexity", "kl_mean", "top1_agreement")
#: What an input is that the store does not have, by its name in the action.
_KINDS = {"model": "model", "base": "model", "tokenizer": "tokenizer", "data": "text", "text": "text"}
_ABOUT = ("source", "license")


def lineage(store: Store, artifact: str) -> tuple[dict[str, Json], ...]:
    """The artifact first, the checkpoint last, as far back as the store knows."""
    return tuple(_ancestors(store, artifact))


def tree(store: Store, artifact: str) -> dict[str, Json]:
    """The artifact with all its inputs, each with theirs, as far back as the store knows.

    What comes a second time is told once: then it has `again` in place of its inputs.
    """
    return _node(store, artifact, None, {}, _evaluations(store), set())


def input_names(action: Action) -> list[str]:
    """The names of an action's inputs, without what is said of each of them."""
    about = {f"{name}_{said}" for name in action.inputs for said in _ABOUT}
    return [name for name in sorted(action.inputs) if name not in about]


def _node(
    store: Store,
    id_: str,
    role: str | None,
    said: Mapping[str, str],
    measured: Mapping[str, dict[str, Json]],
    seen: set[str],
) -> dict[str, Json]:
    manifest = _manifest(store, id_)
    node: dict[str, Json] = {"input": role, "id": id_, "stored": manifest is not None}
    node |= {about: said.get(about) for about in _ABOUT}
    if manifest is None:
        kind = _KINDS.get(role or "model", role) if id_.startswith("sha256:") else "server"
        return {**node, "kind": kind, "op": None, "metrics": measured.get(id_, {}), "inputs": []}
    action = manifest.action
    inherited = licenses.join(stated.license for stated in licenses.of_manifest(manifest))
    node |= {
        "kind": manifest.kind,
        "op": None if action is None else action.op,
        "license": said.get("license") or inherited,
        "bytes": manifest.size,
        "metrics": {**measured.get(id_, {}), **_figures(manifest)},  # how good it is comes first
    }
    if id_ in seen and action is not None:
        return {**node, "again": True, "inputs": []}
    seen.add(id_)
    below: list[Json] = []
    for name in [] if action is None else input_names(action):
        assert action is not None
        of_it = {about: text for about in _ABOUT if (text := action.inputs.get(f"{name}_{about}")) is not None}
        below.append(_node(store, action.inputs[name], name, of_it, measured, seen))
    return {**node, "inputs": below}


def _ancestors(store: Store, artifact: str) -> Iterator[dict[str, Json]]:
    measured = _evaluations(store)
    id_, source = artifact, None
    while True:
        manifest = _manifest(store, id_)
        if manifest is None:
            yield {"id": id_, "kind": "model", "source": source, "metrics": measured.get(id_, {})}
            return
        action = manifest.action
        yield {
            "id": id_,
            "kind": manifest.kind,
            "op": None if action is None else action.op,
            "settings": {} if action is None else dict(action.settings),
            "metrics": _figures(manifest) | measured.get(id_, {}),
            "bytes": manifest.size,
        }
        parent = None if action is None else next((name for name in _PARENTS if name in action.inputs), None)
        if action is None or parent is None:
            return
        id_, source = action.inputs[parent], action.inputs.get(f"{parent}_source")


def _manifest(store: Store, id_: str) -> Manifest | None:
    """None for a folder of the user's, known by its digest alone, and for a server, known by its URL."""
    try:
        return store.get(id_)
    except LlmoptError:
        return None


def _figures(manifest: Manifest) -> dict[str, Json]:
    return {name: value for name, value in manifest.metrics.items() if not isinstance(value, dict | list)}


def _evaluations(store: Store) -> dict[str, dict[str, Json]]:
    """What `llmopt eval` measured, by the id of the model; the last where there are several."""
    found: dict[str, dict[str, Json]] = {}
    for action in store.actions("eval"):
        model, results = action.inputs.get("model"), store.results(action.key)
        if model is None or not results:
            continue
        try:
            metrics = store.get(results[-1]).metrics
        except LlmoptError:
            continue
        found[model] = {name: metrics[name] for name in _QUALITY if name in metrics}
    return found
