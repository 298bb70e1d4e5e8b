"""Artifacts: folders of files named by their digest, the actions that make them, and the store that keeps them."""

from llmopt.artifacts.attestation import attest
from llmopt.artifacts.digest import describe, sha256_file
from llmopt.artifacts.export import check_out
from llmopt.artifacts.manifest import Action, FileEntry, Manifest, canonical_json
from llmopt.artifacts.outcome import Json, Outcome, Progress, silent
from llmopt.artifacts.store import Store

__all__ = [
    "Action",
    "FileEntry",
    "Json",
    "Manifest",
    "Outcome",
    "Progress",
    "Store",
    "attest",
    "canonical_json",
    "check_out",
    "describe",
    "sha256_file",
    "silent",
]
