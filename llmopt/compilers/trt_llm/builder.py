"""The environment that a user names for TensorRT-LLM: an interpreter that has it, or a container image.

TensorRT-LLM pins its own torch and CUDA, and its wheels are NVIDIA's: it is run, never imported or installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmopt.errors import BackendMissingError, LlmoptError, SettingsError

#: What runs a command of TensorRT-LLM where its script does not lie beside the interpreter.
MODULES: Mapping[str, str] = {
    "trtllm-build": "tensorrt_llm.commands.build",
    "trtllm-serve": "tensorrt_llm.commands.serve",
}
TIMEOUT_S = 4 * 3600.0  # 70B parameters on eight ranks, one after the other, take more than an hour
_VERSIONS_TIMEOUT_S = 120.0  # a container's first start
_MARK = "llmopt-versions "

# Imports nothing: `import tensorrt_llm` takes half a minute and wants a GPU. `version.py` is there where it runs from
# a folder that was never installed, and has what the metadata does not: the CUDA that torch was built for.
_ASK = """
import json, os, runpy, sys
from importlib import metadata, util

def told(name, field="__version__"):
    try:
        folder = os.path.dirname(util.find_spec(name).origin)
        return str(runpy.run_path(os.path.join(folder, "version.py"))[field])
    except Exception:
        return None

def version(name):
    try:
        return metadata.version(name)
    except Exception:
        return told(name)

found = {name: version(name) for name in ("tensorrt_llm", "tensorrt", "torch", "transformers")}
found.update(cuda=told("torch", "cuda"), python=sys.version.split()[0])
print("llmopt-versions " + json.dumps(found))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Builder:
    """Where TensorRT-LLM runs. name: the interpreter's path, or the image's name.

    timeout_s: that one build may take there, in all; timing_cache: of an earlier one, to begin with.
    """

    kind: Literal["python", "docker"]
    name: str
    timeout_s: float = TIMEOUT_S
    timing_cache: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Builder:
        """`python:PATH`, `docker:IMAGE`, a path, or a program on the PATH. SettingsError for what cannot be run."""
        kind, colon, name = text.partition(":")
        if not text:
            raise SettingsError("the builder is named by nothing", hint="a Python with tensorrt_llm, or `docker:IMAGE`")
        if colon and kind == "docker":
            if not name:
                raise SettingsError(f"the builder `{text}` names no image", hint="for example `docker:IMAGE:TAG`")
            if shutil.which("docker") is None:
                raise BackendMissingError("`docker` is not installed", hint="name an interpreter: `python:PATH`")
            return cls(kind="docker", name=name)
        # Not resolved: the interpreter of a virtual environment is a link, and knows its place by its name.
        given = name if colon and kind == "python" else text
        path = Path((shutil.which(given) if "/" not in given else None) or given).expanduser().absolute()
        if path.is_dir():
            inside = next((path / place for place in ("bin/python", "python") if (path / place).is_file()), None)
            hint = f"did you mean `{inside}`?" if inside else "name the interpreter in it"
            raise SettingsError(f"the builder `{path}` is a folder", hint=hint)
        if not path.is_file() or not os.access(path, os.X_OK):
            raise SettingsError(
                f"the builder `{text}` is no program",
                hint="the path of a Python that has tensorrt_llm, such as `/opt/trtllm/bin/python`, or `docker:IMAGE`",
            )
        return cls(kind="python", name=str(path))

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    def argv(self, command: Sequence[str]) -> list[str]:
        """A command of TensorRT-LLM as this environment spells it; in a container it is on the PATH."""
        first, *rest = command
        if self.kind == "docker":
            return [first, *rest]
        script = Path(self.name).parent / first
        if os.access(script, os.X_OK):
            return [str(script), *rest]
        return [self.name, "-m", MODULES[first], *rest]


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """How a container is started: which folders it sees where, and under which name it can be ended."""

    image: str
    name: str
    folders: Sequence[tuple[Path, str, bool]]  # here, there, whether it may write
    work: str
    environment: Mapping[str, str]

    def argv(self, command: Sequence[str]) -> list[str]:
        """As the user, on the host's network, with all GPUs and the shared memory that several ranks need.

        `--init` passes SIGTERM on to the command. HOME and USER are told because the user has no account in there.
        """
        told = {"HOME": "/tmp", "USER": "llmopt", **self.environment}
        return [
            *("docker", "run", "--rm", "--init", "--pull", "never", "--name", self.name),
            *("--gpus", "all", "--ipc", "host", "--network", "host", "--user", f"{os.getuid()}:{os.getgid()}"),
            *(word for key, value in told.items() for word in ("--env", f"{key}={value}")),
            *(word for folder in self.folders for word in ("--mount", _mount(*folder))),
            *("--workdir", self.work, self.image, *command),
        ]

    @property
    def cleanup(self) -> list[str]:
        """Ends it where its client was killed."""
        return ["docker", "rm", "--force", self.name]


def _mount(here: Path, there: str, writable: bool) -> str:
    """docker reads this as a row of CSV; `--volume` could not have a colon in a path."""
    fields = ["type=bind", f"source={here}", f"target={there}", *([] if writable else ["readonly"])]
    return ",".join('"' + field.replace('"', '""') + '"' if {",", '"'} & set(field) else field for field in fields)


def versions(builder: Builder, *, timeout_s: float = _VERSIONS_TIMEOUT_S) -> dict[str, str | None]:
    """The versions of tensorrt_llm, tensorrt, torch, transformers, CUDA and Python; None for what is not there.

    An image's id is among them. Raises BackendMissingError where it has no TensorRT-LLM, LlmoptError where it does not
    answer.
    """
    if builder.kind == "docker":
        image = _output(["docker", "image", "inspect", "--format", "{{.Id}}", builder.name], builder, timeout_s)
        run = ["docker", "run", "--rm", "--pull", "never", "--network", "none", builder.name]
        found = _parse(_output([*run, "python3", "-c", _ASK], builder, timeout_s), builder)
        found["image"] = image.strip()
    else:
        found = _parse(_output([builder.name, "-c", _ASK], builder, timeout_s), builder)
    if found["tensorrt_llm"] is None:
        raise BackendMissingError(f"`{builder}` has no tensorrt_llm", hint="name the environment that has it")
    return found


def _output(command: Sequence[str], builder: Builder, timeout_s: float) -> str:
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise LlmoptError(f"`{builder}` did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise LlmoptError(f"`{builder}` cannot be run: {error.strerror}") from None
    if asked.returncode == 0:
        return asked.stdout
    words = asked.stderr.strip()[-1000:] or "it said nothing"
    hint = "is it a Python with tensorrt_llm?"
    if builder.kind == "docker":
        missing = "no such image" in words.lower()
        hint = f"`docker pull {builder.name}`" if missing else "does `docker run` work here?"
    raise LlmoptError(f"`{builder}` failed with exit code {asked.returncode}: {words}", hint=hint)


def _parse(output: str, builder: Builder) -> dict[str, str | None]:
    """The answer, wherever it stands among what an image's entrypoint prints."""
    for line in output.splitlines():
        if line.startswith(_MARK):
            found: dict[str, str | None] = json.loads(line.removeprefix(_MARK))
            return found
    raise LlmoptError(f"`{builder}` does not answer as a Python does", hint="name a Python that has tensorrt_llm")
