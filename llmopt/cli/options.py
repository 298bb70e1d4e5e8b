"""The options that several commands share, and how a command starts from them.

Every setting is None unless given, so that after the flag and the environment (`LLMOPT_<COMMAND>_<OPTION>`) a profile
and at last the stage's own default can speak.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmopt.cli.console import Console, start
from llmopt.errors import SettingsError

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store
    from llmopt.artifacts.trust.keys import SigningKey
    from llmopt.compilers.trt_llm.builder import Builder as GpuBuilder

#: Every option can be set in the environment: `llmopt --help` says so once, and no option says it again.
option = partial(typer.Option, show_envvar=False)
#: Usage and description of a command name its arguments, so its help has no list of them.
argument = partial(typer.Argument, hidden=True)

Profile = Annotated[
    str | None, option("--profile", metavar="P", help="Settings to start from: a shipped profile, or a YAML file.")
]
Out = Annotated[
    str | None, option("--out", metavar="DIR", help="Also copy the artifact into this folder or s3://BUCKET/PREFIX.")
]
Name = Annotated[str | None, option("--name", metavar="NAME", help="Also give the artifact this name in the store.")]
Builder = Annotated[
    str | None,
    option("--builder", metavar="B", help="What builds on a GPU: a Python with tensorrt_llm, or `docker:IMAGE`."),
]
DenyLicense = Annotated[
    list[str] | None,
    option(
        "--deny-license",
        envvar="LLMOPT_DENY_LICENSE",
        metavar="PATTERN",
        help="Refuse inputs with such a licence ('llama*', '*-nc-*'), or with none (unknown).",
    ),
]
Seed = Annotated[int | None, option("--seed", metavar="N", help="Of every random choice.")]

#: Of the commands that make artifacts; one variable for all of them.
SignKey = Annotated[
    str | None,
    option("--sign-key", envvar="LLMOPT_SIGN_KEY", metavar="FILE", help="Sign what is made with this private key."),
]

#: Of the commands that use or make artifacts.
Remote = Annotated[
    str | None,
    option(
        "--remote", envvar="LLMOPT_REMOTE", metavar="URL", help="Look in this store too: s3://BUCKET/PREFIX or DIR."
    ),
]
Push = Annotated[
    bool, option("--push/--no-push", envvar="LLMOPT_PUSH", help="Send what is made to the --remote as well.")
]
Verify = Annotated[
    str | None,
    option(
        "--verify",
        envvar="LLMOPT_VERIFY",
        metavar="HOW",
        help="stat: read only what has changed since; full: all.",
    ),
]

# Every command has these (but for --json-lines), and makes its session of them.
StoreFolder = Annotated[
    str | None,
    option("--store", envvar="LLMOPT_STORE", metavar="URL", help="The artifacts: a folder or s3://BUCKET/PREFIX."),
]
Json = Annotated[bool, option("--json", help="Print the result as one JSON object.")]
#: Of the commands that say what they are doing.
JsonLines = Annotated[
    bool, option("--json-lines", help="Print progress, then the result, each as a JSON object on a line of its own.")
]
Quiet = Annotated[bool, option("--quiet", "-q", help="No progress on stderr.")]
Verbose = Annotated[bool, option("--verbose", "-v", help="Times on stderr, and tracebacks of errors.")]


@dataclass(frozen=True)
class Session:
    """What every command has: somewhere to speak, and the store (opened when first asked for), which may sign."""

    console: Console
    store_location: str | None
    signer: SigningKey | None = None
    remote: str | None = None
    push: bool = False
    verify: str | None = None

    @cached_property
    def store(self) -> Store:
        """Opened when first asked for, with what the environment says of trust and of the cache on this disk."""
        from llmopt.artifacts.objects import is_s3

        location = self.store_location or os.environ.get("LLMOPT_STORE") or None
        if self.remote is None and not is_s3(location or ""):
            from llmopt.artifacts.store import Store

            store = Store(Store.open(location).root, verify_full=self.verify == "full")
        else:
            from llmopt.artifacts.remote.shared import open_store
            from llmopt.artifacts.trust.keys import trusted_keys

            store = open_store(
                location,
                remote=self.remote,
                push=self.push,
                trust=trusted_keys(os.environ.get("LLMOPT_TRUST")),
                cache_bytes=byte_size("LLMOPT_CACHE_SIZE", os.environ.get("LLMOPT_CACHE_SIZE") or None, "="),
                verify_full=self.verify == "full",
                progress=self.console.progress,
            )
        store.signer = self.signer
        return store


def session(
    store: str | None,
    *,
    json: bool,
    quiet: bool,
    verbose: bool,
    json_lines: bool = False,
    sign_key: str | None = None,
    remote: str | None = None,
    push: bool = False,
    verify: str | None = None,
) -> Session:
    """The first thing in a command: from here on, errors too are told as these flags ask. A key is read at once."""
    console = start(as_json=json, as_lines=json_lines, quiet=quiet, verbose=verbose)
    if json and json_lines:
        raise SettingsError("`--json` and `--json-lines` cannot both be given", hint="give one of them")
    if verify not in (None, "stat", "full"):
        raise SettingsError(f"`--verify` cannot be `{verify}`", hint="`stat` or `full`")
    if push and remote is None and not (store or os.environ.get("LLMOPT_STORE") or "").startswith("s3://"):
        raise SettingsError("`--push` needs to know where to", hint="`--remote s3://BUCKET/PREFIX`")
    signer = None
    if sign_key is not None:
        from llmopt.artifacts.trust.keys import read_private

        signer = read_private(sign_key)
    return Session(console, store, signer, remote, push, verify)


def settings(profile: str | None, section: str, **options: Any) -> dict[str, Any]:
    """The settings of one stage: a profile's section, under the options that were given."""
    given = {key: value for key, value in options.items() if value is not None}
    if profile is None:
        return given
    from llmopt import profiles

    return profiles.load(profile).section(section) | given


def overridden(settings: dict[str, Any], overrides: list[str] | None) -> dict[str, Any]:
    """The settings with each `key=value` of `--set` in its place; `build.workers=2` reaches into a mapping."""
    from llmopt.profiles import assign

    for override in overrides or ():
        path, equals, text = override.partition("=")
        if not equals or not all(path.split(".")):
            raise SettingsError(f"`--set {override}` is not `key=value`", hint="for example `--set build.workers=2`")
        settings = assign(settings, path, text)
    return settings


def builder(text: str | None, *, timeout_s: float | None = None, timing_cache: str | None = None) -> GpuBuilder | None:
    """The value of `--builder` with what else is said of a build, as far as that needs no GPU; None without one."""
    if timeout_s is not None and timeout_s <= 0:
        raise SettingsError(f"`--timeout` cannot be `{timeout_s:g}`", hint="a number of seconds")
    for flag, value in (("--timeout", timeout_s), ("--timing-cache", timing_cache)):
        if text is None and value is not None:
            raise SettingsError(f"`{flag}` is of a build, and nothing is built", hint="name a `--builder`")
    if text is None:
        return None
    from llmopt.compilers.trt_llm.builder import TIMEOUT_S, Builder

    cache = None if timing_cache is None else Path(timing_cache)
    return replace(Builder.parse(text), timeout_s=timeout_s or TIMEOUT_S, timing_cache=cache)


def duration(flag: str, text: str) -> float:
    """`90s`, `30m`, `12h` or `14d`, the value of `flag`, in seconds."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise SettingsError(f"`{flag} {text}` is not a length of time", hint=f"for example `{flag} 14d`")
    return seconds


def integers(flag: str, text: str | None) -> list[int] | None:
    """`1,4,16`, the value of `flag`, as a list."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(
            f"`{flag} {text}` is not a list of whole numbers", hint=f"for example `{flag} 1,4,16`"
        ) from None


def numbers(flag: str, text: str | None) -> list[float] | None:
    """`2,8.5`, the value of `flag`, as a list."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"`{flag} {text}` is not a list of numbers", hint=f"for example `{flag} 2,8.5`") from None


def byte_size(flag: str, text: str | None, joint: str = " ") -> int | None:
    """`8GiB` or `500MB`, the value of `flag`, in bytes; a bare number counts bytes."""
    if text is None:
        return None
    units = {"": 1, "b": 1} | {
        f"{unit}{'i' * binary}b": (1024 if binary else 1000) ** power
        for power, unit in enumerate("kmgt", 1)
        for binary in (True, False)
    }
    number = text.strip().lower().rstrip("bigkmt")
    unit = text.strip().lower()[len(number) :]
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise SettingsError(
            f"`{flag}{joint}{text}` is not a size", hint=f"for example `{flag}{joint}8GiB` or `{flag}{joint}500MB`"
        )
    return size
