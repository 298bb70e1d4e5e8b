"""The boundary: every error in the same form, every exit code in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from llmopt.cli import app, console
from llmopt.errors import (
    BackendMissingError,
    CorruptError,
    LlmoptError,
    MeasurementInvalidError,
    SettingsError,
)

Llmopt = Callable[..., Any]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `llmopt doctor` end in an exception."""

    def arrange(error: BaseException) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("llmopt.pipeline.machine.cpu", fail)

    return arrange


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LlmoptError("x"), 1),
        (SettingsError("x"), 2),
        (BackendMissingError("x"), 3),
        (CorruptError("x"), 4),
        (MeasurementInvalidError("x"), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code(llmopt: Llmopt, failing: Any, error: BaseException, code: int) -> None:
    failing(error)
    assert llmopt("doctor").code == code


def test_an_error_is_a_message_a_blank_line_and_a_hint(llmopt: Llmopt, failing: Any) -> None:
    failing(LlmoptError("`x` is wrong", hint="make it right"))
    ran = llmopt("doctor")
    assert ran.err == "error: `x` is wrong\n\nhint: make it right\n"
    assert ran.out == ""


def test_with_json_an_error_is_one_object_on_stdout(llmopt: Llmopt, failing: Any) -> None:
    failing(CorruptError("`x` is wrong", hint="make it right"))
    ran = llmopt("doctor", "--json")
    assert ran.json == {"error": "`x` is wrong", "hint": "make it right", "exit_code": 4}
    assert ran.err == "error: `x` is wrong\n\nhint: make it right\n"


def test_with_json_a_misspelt_option_is_an_object_too(llmopt: Llmopt) -> None:
    assert llmopt("doctor", "--json", "--stoer", "x").json["exit_code"] == 2


def test_an_interrupt_is_one_line(llmopt: Llmopt, failing: Any) -> None:
    failing(KeyboardInterrupt())
    assert llmopt("doctor").err == "error: interrupted; nothing half-written is left\n"


def test_a_bug_keeps_its_traceback(llmopt: Llmopt, failing: Any) -> None:
    failing(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        llmopt("doctor")


def test_verbose_shows_where_an_error_came_from(llmopt: Llmopt, failing: Any) -> None:
    failing(LlmoptError("x"))
    assert "Traceback" in llmopt("doctor", "-v").err
    assert "Traceback" not in llmopt("doctor").err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["quantise"], "no such command `quantise`", "did you mean `quantize`?"),
        (["store", "lss"], "no such command `lss`", "did you mean `ls`?"),
        (["doctor", "--jsn"], "no such option `--jsn`", "did you mean `--json`?"),
        (["quantize"], "missing argument `MODEL`", "see `llmopt quantize --help`"),
        (["serve", "x", "--port", "70000"], None, "see `llmopt serve --help`"),
        (["quantize", "x", "--bits", "four"], "invalid value for `--bits`: `four` is not a valid integer", None),
        (["quantize", "x", "--bits"], "option `--bits` requires an argument", None),
        (["doctor", "extra"], None, "see `llmopt doctor --help`"),
        (["profiles"], "missing command", "known: `ls`, `show`"),
    ],
)
def test_wrong_usage_is_told_in_the_same_form(
    llmopt: Llmopt, arguments: list[str], message: str | None, hint: str | None
) -> None:
    ran = llmopt(*arguments)
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert message is None or ran.err.splitlines()[0] == f"error: {message}"
    assert hint is None or ran.err.splitlines()[-1] == f"hint: {hint}"


def test_without_arguments_it_is_help_and_no_error(llmopt: Llmopt) -> None:
    ran = llmopt()
    assert ran.code == 0
    assert "quantize" in ran.out


def test_version_is_printed(llmopt: Llmopt) -> None:
    import llmopt as package

    assert llmopt("--version").out == f"llmopt {package.__version__}\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m llmopt profiles show demo | head -c 1 > /dev/null"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ran.stderr == ""


def test_output_is_the_same_on_a_terminal_without_colour(llmopt: Llmopt, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = llmopt("profiles", "ls").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    assert llmopt("profiles", "ls").out == plain
    assert "\x1b" not in plain


def test_quiet_silences_progress_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    quiet = console.Console(quiet=True)
    quiet.progress("working")
    quiet.result("done", {})
    assert capfd.readouterr() == ("done\n", "")


def test_sigterm_ends_as_an_interrupt_does() -> None:
    code = (
        "import os, signal, sys\n"
        "from llmopt.cli import app\n"
        "from llmopt.pipeline import machine\n"
        "machine.cpu = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(app.main(['doctor']))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    assert ran.returncode == 130
    assert ran.stderr.startswith("error: interrupted")


def test_the_documented_codes_are_those_of_the_enum() -> None:
    assert {int(code) for code in app.Exit} == {0, 1, 2, 3, 4, 5, 6, 7, 130}


def test_json_is_read_back_with_every_character(capfd: pytest.CaptureFixture[str]) -> None:
    console.Console(as_json=True).result("", {"text": "für\n„\u2028“"})
    assert json.loads(capfd.readouterr().out) == {"text": "für\n„\u2028“"}
