"""Licences of models, adapters and data sets: what cards and licence files state, and what is made of them inherits.

A licence is written as Hugging Face's cards do (`apache-2.0`, `llama3.1`), several as in an SPDX expression: joined by
` AND `. What a file says is told from the title of its text: nobody has read it, and an addendum is not seen.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.manifest import Manifest

AND = " AND "
CARD = "README.md"
#: Beginnings of the names of files with a licence, and of those that only say who is to be named.
FILES, NOTICES = ("LICENSE", "LICENCE", "COPYING"), ("NOTICE",)
#: The pattern that also stands for inputs that state no licence.
UNKNOWN = "unknown"
#: An action's inputs of which what it makes is a form; of the text that one is calibrated on, nothing is in it.
_CARRIED = ("model", "adapter", "prepared", "base", "data")

#: The titles of well-known texts, in lower case with single spaces. The one that comes first in a file counts.
TITLES: Mapping[str, str] = {
    "apache license version 2.0": "apache-2.0",
    "modified mit license": "modified-mit",
    "mit license": "mit",
    "permission is hereby granted free of charge to any person obtaining a copy": "mit",
    "bsd 3 clause license": "bsd-3-clause",
    "bsd 2 clause license": "bsd-2-clause",
    "llama 2 community license agreement": "llama2",
    "llama 2 is licensed under the llama 2 community license": "llama2",
    "llama 3 community license agreement": "llama3",
    "llama 3 is licensed under the meta llama 3 community license": "llama3",
    "llama 3.1 community license": "llama3.1",
    "llama 3.2 community license": "llama3.2",
    "llama 3.3 community license": "llama3.3",
    "llama 4 community license": "llama4",
    "gemma terms of use": "gemma",
    "gemma is provided under and subject to the gemma terms": "gemma",
    "tongyi qianwen license agreement": "tongyi-qianwen",
    "tongyi qianwen research license agreement": "tongyi-qianwen-research",
    "qwen license agreement": "qwen",
    "qwen research license agreement": "qwen-research",
    "mistral ai research license": "mrl",
    "mistral ai non production license": "mnpl",
    "deepseek license agreement": "deepseek",
    "tii falcon llm license": "falcon-llm-license",
    "bigscience rail license": "bigscience-bloom-rail-1.0",
    "bigscience openrail m": "bigscience-openrail-m",
    "bigscience open rail m": "bigscience-openrail-m",
    "bigcode openrail m": "bigcode-openrail-m",
    "bigcode open rail m": "bigcode-openrail-m",
    "creativeml open rail m": "creativeml-openrail-m",
    "creativeml open rail++ m": "openrail++",
    "open rail m": "openrail",
    "openrail m": "openrail",
    "attribution 4.0 international": "cc-by-4.0",
    "attribution sharealike 4.0 international": "cc-by-sa-4.0",
    "attribution noncommercial 4.0 international": "cc-by-nc-4.0",
    "attribution noncommercial sharealike 4.0 international": "cc-by-nc-sa-4.0",
    "attribution noderivatives 4.0 international": "cc-by-nd-4.0",
    "attribution noncommercial noderivatives 4.0 international": "cc-by-nc-nd-4.0",
    "cc0 1.0 universal": "cc0-1.0",
    "gnu affero general public license version 3": "agpl-3.0",
    "gnu lesser general public license version 3": "lgpl-3.0",
    "gnu general public license version 3": "gpl-3.0",
    "gnu general public license version 2": "gpl-2.0",
    "mozilla public license version 2.0": "mpl-2.0",
}
_BSD, _BSD3 = "redistribution and use in source and binary forms", "neither the name of"
_TITLE_CHARACTERS = 4096  # of a text's beginning, in which its title lies
_CARD_BYTES = 1 << 20  # of a card's beginning: some list hundreds of results in their front matter
_STATED = re.compile(r"^(license|license_name)[ \t]*:.*(?:\n(?:[ \t]|- ).*)*", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Stated:
    """One licence and where it was found: a file's name, or `its manifest`."""

    license: str
    where: str


def of_folder(folder: Path, *, card: bool = True) -> tuple[Stated, ...]:
    """What the card and the licence files at the top of a folder state; nothing where neither is there."""
    files = sorted(file for file in folder.iterdir() if file.name.startswith(FILES + NOTICES) and file.is_file())
    found = [stated for file in files if (stated := _of_file(file)) is not None]
    named = of_card(_beginning(folder / CARD)) if card else ()
    if found:  # the card calls it `other`, the file says which
        named = tuple(license for license in named if license != "other")
    return tuple(dict.fromkeys([*(Stated(license, CARD) for license in named), *found]))


def of_manifest(manifest: Manifest) -> tuple[Stated, ...]:
    """What an artifact inherits from what it was made from, as its action's inputs state it."""
    inputs: Mapping[str, str] = {} if manifest.action is None else manifest.action.inputs
    expressions = [text for name in _CARRIED if (text := inputs.get(f"{name}_license"))]
    return tuple(Stated(license, "its manifest") for license in split(join(expressions)))


def join(expressions: Iterable[str]) -> str | None:
    """One expression of several, each licence once and in order; None of none."""
    licenses = {license for expression in expressions for license in split(expression)}
    return AND.join(sorted(licenses, key=lambda license: (license.lower(), license))) or None


def split(expression: str | None) -> tuple[str, ...]:
    return () if expression is None else tuple(part.strip() for part in expression.split(AND) if part.strip())


def of_card(text: str) -> tuple[str, ...]:
    """The licences in the YAML front matter of a model card; `other` by its `license_name` where it has one."""
    front = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\n---", text.replace("\r\n", "\n"), re.DOTALL)
    lines = "" if front is None else "\n".join(match[0] for match in _STATED.finditer(front[1]))
    if not lines:
        return ()
    import yaml

    try:
        values = yaml.safe_load(lines)
    except yaml.YAMLError:
        return ()
    name = values.get("license_name")
    given = values.get("license")
    licenses = [_word(license) for license in (given if isinstance(given, list) else [given])]
    named = [_word(name) or license if license == "other" else license for license in licenses]
    return tuple(dict.fromkeys(license for license in named if license))


def of_text(text: str) -> str | None:
    """The licence whose title comes first in a text; None where none is known."""
    words = re.sub(r"[^a-z0-9.+]+", " ", text[: 4 * _TITLE_CHARACTERS].lower())[:_TITLE_CHARACTERS]
    places = {title: words.find(title) for title in TITLES}
    first = min((title for title, place in places.items() if place >= 0), key=places.__getitem__, default=None)
    if first is not None:
        return TITLES[first]
    if _BSD in words:
        return "bsd-3-clause" if _BSD3 in words else "bsd-2-clause"
    return None


def denied(stated: Sequence[Stated], patterns: Sequence[str]) -> tuple[Stated | None, str] | None:
    """The first licence that a pattern (a glob, whatever the case) names, and the pattern; (None, `unknown`) for none
    stated."""
    for pattern in patterns:
        if not stated and pattern.lower() == UNKNOWN:
            return None, pattern
        for each in stated:
            if fnmatchcase(each.license.lower(), pattern.lower()):
                return each, pattern
    return None


def _of_file(file: Path) -> Stated | None:
    """Of an unknown licence the digest of its text; a notice that names none is no licence."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise LlmoptError(f"`{file}` cannot be read: {error.strerror}") from error
    license = of_text(data.decode("utf-8", errors="replace"))
    if license is None and not file.name.startswith(NOTICES):
        license = f"LicenseRef-{hashlib.sha256(data).hexdigest()[:12]}"
    return None if license is None else Stated(license, file.name)


def _beginning(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(_CARD_BYTES).decode("utf-8", errors="replace")
    except OSError:  # a card is optional
        return ""


def _word(value: object) -> str:
    """A licence's identifier; a name with spaces would not be one licence in an expression."""
    return "-".join(value.lower().split()) if isinstance(value, str) else ""
