"""What belongs to a model beside its weights and config.json, and goes with it from stage to stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.artifacts import licenses
from llmopt.errors import LlmoptError

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
#: Beginnings of the names of those that a licence asks to go along; they are in the digest of a model.
_LICENCES = licenses.FILES + licenses.NOTICES


def companions(folder: Path) -> list[str]:
    """The names of those that a folder has."""
    return sorted(
        file.name
        for file in folder.iterdir()
        if (file.name in COMPANIONS or file.name.startswith(_LICENCES)) and file.is_file()
    )


def copy_companions(source: Path, out: Path) -> None:
    """Copy the tokenizer, templates and licences that go with the weights."""
    for name in companions(source):
        shutil.copyfile(source / name, out / name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an absent file is an empty one."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LlmoptError(f"`{path}` is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise LlmoptError(f"`{path}` holds no JSON object")
    return values


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
