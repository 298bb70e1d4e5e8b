"""What an artifact was made from, back to the checkpoint, with what was measured of each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmopt.artifacts.outcome import Json
from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store

#: The input that an artifact is a form of.
_PARENTS = ("prepared", "model")
#: Of an evaluation, what a reader of another report wants to see.
_QUALITY = ("perplexity", "base_perplexity", "kl_mean", "top1_agreement")


def lineage(store: Store, artifact: str) -> tuple[dict[str, Json], ...]:
    """The artifact first, the checkpoint last, as far back as the store knows."""
    return tuple(_ancestors(store, artifact))


def _ancestors(store: Store, artifact: str) -> Iterator[dict[str, Json]]:
    measured = _evaluations(store)
    id_, source = artifact, None
    while True:
        try:
            manifest = store.get(id_)
        except LlmoptError:  # a folder of the user's, known by its digest alone
            yield {"id": id_, "kind": "model", "source": source, "metrics": measured.get(id_, {})}
            return
        action = manifest.action
        figures = {name: value for name, value in manifest.metrics.items() if not isinstance(value, dict | list)}
        yield {
            "id": id_,
            "kind": manifest.kind,
            "op": None if action is None else action.op,
            "settings": {} if action is None else dict(action.settings),
            "metrics": figures | measured.get(id_, {}),
            "bytes": manifest.size,
        }
        parent = None if action is None else next((name for name in _PARENTS if name in action.inputs), None)
        if action is None or parent is None:
            return
        id_, source = action.inputs[parent], action.inputs.get(f"{parent}_source")


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
