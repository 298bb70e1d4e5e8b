"""`--help` is quick, and loads nothing that only the work needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from llmopt.cli.app import app

HEAVY = {
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "openvino", "openvino_genai", "starlette", "uvicorn",
    "rich", "pydantic", "yaml", "boto3", "obstore", "cryptography",
}  # fmt: skip


def walk(command: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TyperGroup | TyperCommand]]:
    assert isinstance(command, TyperGroup | TyperCommand)
    yield path, command
    if isinstance(command, TyperGroup):
        for name, below in command.commands.items():
            yield from walk(below, (*path, name))


COMMANDS = dict(walk(get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_loads_nothing_heavy(path: tuple[str, ...]) -> None:
    code = (
        "import json, sys\n"
        "from llmopt.cli.app import main\n"
        f"code = main({[*path, '--help']!r})\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.startswith("Usage: llmopt")
    names = json.loads(ran.stderr)
    assert not {name.partition(".")[0] for name in names} & HEAVY
    assert {name.split(".")[1] for name in names if name.startswith("llmopt.")} == {"cli", "errors"}


@pytest.mark.parametrize("path", [(), ("quantize",), ("store", "ls")], ids=" ".join)
def test_help_costs_little(path: tuple[str, ...]) -> None:
    """A loose bound, for machines busy with other things; `make bench` has the figure."""
    assert min(cpu_seconds([sys.executable, "-m", "llmopt", *path, "--help"]) for _ in range(3)) < 0.5


def cpu_seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_help_names_every_method_format_and_target() -> None:
    from llmopt.compilers import TARGETS
    from llmopt.formats.scheme import FORMATS
    from llmopt.quantizers import METHODS

    quantize, compile_ = (
        command.get_help(typer.Context(command)) for command in (COMMANDS["quantize",], COMMANDS["compile",])
    )
    for name in (*METHODS, *FORMATS):
        assert name in quantize
    for name in TARGETS:
        assert name in compile_


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_and_option_says_what_it_is(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert command.help
    for parameter in command.params:
        assert not isinstance(parameter, TyperOption) or parameter.help, parameter.name


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_is_in_the_environment_under_its_own_name(path: tuple[str, ...]) -> None:
    for option in COMMANDS[path].params:
        if not isinstance(option, TyperOption) or not option.allow_from_autoenv:
            continue
        flag = option.opts[0].removeprefix("--").replace("-", "_").upper()
        assert (option.name or "").upper() == flag or option.envvar == "_".join(["LLMOPT", *path, flag]).upper()
