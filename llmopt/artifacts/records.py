"""The small files of a store on this disk: what is known of its artifacts."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from llmopt.artifacts import layout
from llmopt.artifacts.manifest import MAX_MANIFEST_BYTES, Action, Manifest, canonical_json
from llmopt.artifacts.outcome import Json
from llmopt.errors import LlmoptError

OPTION = "--store"  # names another


def names(folder: Path) -> list[str]:
    """What is in a folder of the store; nothing if it is not there."""
    try:
        return sorted(file.name for file in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise LlmoptError(f"`{folder}` cannot be read: {error.strerror}", hint=f"use another `{OPTION}`") from error


def dated(folder: Path) -> list[tuple[int, str]]:
    """Digest and time (ns) of each `<hex>.json` in a folder; other files are not ours."""
    found = []
    for name in names(folder):
        if (digest := layout.hex_of(name)) is not None:
            with suppress(FileNotFoundError):
                found.append(((folder / name).stat().st_mtime_ns, digest))
    return found


def read(file: Path) -> bytes | None:
    """A small file of the store; None if it is not there."""
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LlmoptError(f"`{file}` cannot be read: {error.strerror}", hint=f"use another `{OPTION}`") from error


def is_whole(file: Path) -> bool:
    """Whether a file is the one that its name says."""
    data = read(file)
    return data is not None and hashlib.sha256(data).hexdigest() == layout.hex_of(file.name)


def as_json(file: Path) -> dict[str, Json] | None:
    try:
        found = json.loads(read(file) or b"null")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def action(file: Path) -> Action | None:
    try:
        return Action.from_json((as_json(file) or {}).get("action"))
    except LlmoptError:
        return None


def action_result(manifest: Manifest) -> bytes:
    """What lies under an action's key for one of its results."""
    assert manifest.action is not None
    return canonical_json(
        {"schema": layout.ACTION_SCHEMA, "artifact": manifest.id, "action": manifest.action.to_json()}
    )
