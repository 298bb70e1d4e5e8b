"""The examples for CI say only what the command understands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from llmopt.bench.report.files import FORMS
from llmopt.bench.report.requests import REQUESTS
from llmopt.cli.app import app

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "ci"
EXAMPLES = sorted(FOLDER.glob("*.yml"))


def scripts(value: Any) -> Iterator[str]:
    """Every text in a YAML that a shell gets."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("run", "script"):
                yield "\n".join(item) if isinstance(item, list) else item
            yield from scripts(item)
    elif isinstance(value, list):
        for item in value:
            yield from scripts(item)


def commands(file: Path) -> list[list[str]]:
    """The words of each `llmopt` command, those of $LOAD and $against in their place."""
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    load = found.get("env", found.get("variables"))["LOAD"]
    lines = (line for script in scripts(found) for line in script.replace("\\\n", " ").splitlines())
    calls = (call for line in lines for call in re.findall(r"\bllmopt (?:[^;|#&>]|<=)*", line))
    return [shlex.split(call.replace("$LOAD", load).replace("$against", "--baseline good --gate")) for call in calls]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_command_is_understood(file: Path) -> None:
    found = commands(file)
    assert len(found) > 8
    for words in found:
        command: Any = get_command(app)
        rest = words[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        if rest[:1] == ["history"]:  # a subject to the parser; `bench` tells them apart
            continue
        command.make_context("llmopt", rest)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_files_it_keeps_are_written(file: Path) -> None:
    named = set(re.findall(r"\bbench/([\w.]+)", file.read_text(encoding="utf-8")))
    assert named <= {*FORMS.values(), REQUESTS}


def test_the_table_names_every_file() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)) == {*FORMS.values(), REQUESTS}


def test_every_exit_code_of_a_bench_is_explained() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d) \|", text, re.MULTILINE) == ["0", "5", "6", "7"]
