"""The command `llmopt`: its subcommands, and the one boundary at which errors become words and exit codes."""

from __future__ import annotations

import os
import re
import signal
import sys
from types import FrameType
from typing import Annotated

import typer
from typer.main import get_command

import llmopt
from llmopt.cli import (
    bench,
    bench_tools,
    console,
    doctor,
    evaluate,
    plan,
    profiles,
    quantize,
    reproduce,
    run,
    serve,
    store,
)
from llmopt.cli import compile as compile_command
from llmopt.cli import options as opt
from llmopt.errors import Exit, LlmoptError, SettingsError, nearest

app = typer.Typer(
    name="llmopt",
    context_settings={"auto_envvar_prefix": "LLMOPT", "help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every option can be set in the environment too, as LLMOPT_<COMMAND>_<OPTION>. A flag goes before the "
    "environment, that before the profile, that before the default.",
    rich_markup_mode=None,
    add_completion=False,
    suggest_commands=False,  # `main` does, in the form of all errors
    pretty_exceptions_enable=False,
)
app.command("run", short_help="Run a pipeline: all of these in one.")(run.run)
app.command("quantize", short_help="Quantize a checkpoint.")(quantize.quantize)
app.command("compile", short_help="Compile a model into an engine.")(compile_command.compile_)
app.command("eval", short_help="Measure perplexity and KL divergence.")(evaluate.evaluate)
app.command("bench", short_help="Load-test an engine or a server.")(bench.bench)
for _name, (_function, _help) in bench_tools.TOOLS.items():
    # A subcommand of a command that takes an argument itself: `main` joins the two words.
    app.command(
        f"bench {_name}",
        short_help=_help,
        context_settings={"auto_envvar_prefix": f"LLMOPT_BENCH_{_name.upper()}"},
    )(_function)
app.command("serve", short_help="Serve an engine, OpenAI-compatible.")(serve.serve)
app.command("plan", short_help="Say what fits where, how fast and for how much.")(plan.plan)
app.command("reproduce", short_help="Make an artifact again, and compare.")(reproduce.reproduce)
app.command("doctor", short_help="Say what this machine can do.")(doctor.doctor)
app.add_typer(store.app)
app.add_typer(profiles.app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llmopt {llmopt.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        opt.option(
            "--version", callback=_version, is_eager=True, allow_from_autoenv=False, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Quantize, compile and load-test language models into verified, reproducible artifacts."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. An exception that is not the user's to mend keeps its traceback."""
    args = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    console.start(as_json="--json" in args, as_lines="--json-lines" in args, quiet=False, verbose=False)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return _invoke(args)
    except LlmoptError as error:
        console.current.error(error)
        return int(error.code)
    except KeyboardInterrupt:
        console.current.error(_InterruptedError("interrupted; nothing half-written is left"))
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone. Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.ERROR)
    finally:
        console.current.close()


def _invoke(args: list[str]) -> int:
    """Not `app()`: that would print errors and take Ctrl-C and a closed pipe to itself."""
    command = get_command(app)
    commands = getattr(command, "commands", {})
    if " ".join(args[:2]) in commands:
        args = [" ".join(args[:2]), *args[2:]]
    try:
        with command.make_context("llmopt", args) as context:
            code = command.invoke(context)
            return code if isinstance(code, int) else int(Exit.OK)
    except typer.Exit as exit_:
        return exit_.exit_code
    except typer.TyperException as error:
        usage = _usage_error(error)
        if len(args) > 1 and args[0] == "bench" and (slip := bench_tools.slip(args[1])) is not None:
            usage.hint = slip
        raise usage from None


def _usage_error(error: typer.TyperException) -> SettingsError:
    """typer's complaint in the form of ours. It keeps its classes of errors to itself, so this asks for attributes."""
    context = getattr(error, "ctx", None)
    option, similar = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    hint = f"see `{context.command_path} --help`" if context else "see `llmopt --help`"
    message = error.format_message().replace("'", "`").rstrip(".")
    message = re.sub(" int( range)?$", " integer", message)
    if message.startswith("No such option"):
        message = f"no such option `{option}`"
        hint = f"did you mean `{similar[0]}`?" if similar else hint
    elif commands := getattr(context and context.command, "commands", None):
        unknown = message.split("`")[1] if message.startswith("No such command") else ""
        message = f"no such command `{unknown}`" if unknown else message
        hint = nearest(unknown, commands)
    return SettingsError(message[:1].lower() + message[1:], hint=hint)


class _InterruptedError(LlmoptError):
    code = Exit.INTERRUPTED


def _terminated(number: int, frame: FrameType | None) -> None:
    """A SIGTERM cleans up as Ctrl-C does: servers are stopped, staging folders removed."""
    raise KeyboardInterrupt
