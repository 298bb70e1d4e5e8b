"""What a user calls an artifact: an id, its first digits, or a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmopt.errors import LlmoptError, nearest

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store


def resolve(store: Store, reference: str) -> str:
    """The full id; LlmoptError with the nearest name when there is none."""
    found = store.resolve(reference)
    if found is None:
        names = store.names()
        hint = nearest(reference, names) if names else "`llmopt store ls` lists the artifacts"
        raise LlmoptError(f"no artifact `{reference}` in the store `{store.url}`", hint=hint)
    return found
