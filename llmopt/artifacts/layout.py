"""Where everything lies in a store, on disk as on S3: the one place that knows the names of its folders."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmopt.errors import SettingsError

ACTION_SCHEMA = "llmopt.action/1"

BLOBS, CHUNKS, MANIFESTS = "blobs/sha256", "chunks/sha256", "manifests/sha256"
ACTIONS, NAMES, ATTESTATIONS, LEASES = "actions", "names", "attestations", "leases"
ALL = (BLOBS, CHUNKS, MANIFESTS, ACTIONS, NAMES, ATTESTATIONS, LEASES)
#: What else a store on disk has: of this machine, and to be had again.
ON_DISK = ("begun", "cache", "size", "sources", "tmp", "trees", "unsigned", "verified")
#: Says that a bucket's prefix is a store; a folder needs none.
MARKER = "llmopt-store.json"

HEX = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
PREFIX = re.compile(r"[0-9a-fA-F]{8,64}")
_ID = re.compile(r"sha256:[0-9a-f]{64}")


def blob(sha256: str) -> str:
    return f"{BLOBS}/{sha256[:2]}/{sha256}"


def chunks(digest: str) -> str:
    """The chunk digests of an artifact's large files."""
    return f"{CHUNKS}/{digest}.json"


def manifest(digest: str) -> str:
    return f"{MANIFESTS}/{digest}.json"


def action(key: str, digest: str = "") -> str:
    """One of an action's results, or (no digest) where they all lie."""
    return f"{ACTIONS}/{key}/{digest}.json" if digest else f"{ACTIONS}/{key}"


def name(text: str) -> str:
    return f"{NAMES}/{text}"


def attestation(digest: str, statement: str = "") -> str:
    """One statement about an artifact, or (none given) where they all lie."""
    return f"{ATTESTATIONS}/{digest}/{statement}.json" if statement else f"{ATTESTATIONS}/{digest}"


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def digest(artifact: str) -> str:
    """The digits of an artifact's full id."""
    if not is_id(artifact):
        raise SettingsError(f"`{artifact}` is not an artifact's full id", hint="`sha256:` and 64 digits")
    return artifact.removeprefix("sha256:")


def checked_key(key: str) -> str:
    if not HEX.fullmatch(key):
        raise SettingsError(f"`{key}` is not an action's key", hint="64 hexadecimal digits")
    return key


def check_name(text: str) -> None:
    """Raise SettingsError for what cannot be a name, or could be taken for a digest."""
    if PREFIX.fullmatch(text):
        raise SettingsError(f"the name `{text}` looks like a digest", hint="add a letter past `f`, or a `-`")
    if not NAME.fullmatch(text):
        raise SettingsError(
            f"`{text}` cannot be a name", hint="letters, digits, `.`, `_` and `-`, at most 128, no sign first"
        )


def hex_of(file: str) -> str | None:
    """The digest in a file's name `<hex>.json`; None for a file that is not ours."""
    stem, _, suffix = file.rpartition("/")[2].partition(".")
    return stem if suffix == "json" and HEX.fullmatch(stem) else None


def is_abbreviated(reference: str) -> bool:
    """Whether this is an id or the beginning of one, and no name; SettingsError for a `sha256:` with too few digits."""
    digits = reference.removeprefix("sha256:")
    if PREFIX.fullmatch(digits):
        return True
    if digits != reference:
        raise SettingsError(f"`{reference}` is not an artifact's id", hint="write `sha256:` and 8 digits or more")
    return False


def the_one(reference: str, ids: Iterable[str]) -> str | None:
    """The id that begins with these digits, None if there is none; SettingsError when there are several."""
    digits = reference.removeprefix("sha256:").lower()
    found = sorted({artifact for artifact in ids if artifact.startswith(f"sha256:{digits}")})
    if len(found) > 1:
        listed = ", ".join(f"`{artifact}`" for artifact in found[:5])
        raise SettingsError(f"`{reference}` fits {len(found)} artifacts", hint=f"write more digits: {listed}")
    return found[0] if found else None
