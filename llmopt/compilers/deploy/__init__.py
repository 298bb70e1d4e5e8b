"""Deployments: files that carry an engine or a bundle into a serving stack, from the settings it was prepared with.

An emitter is a pure function from a `Deployment` to the text of files; EMITTERS names them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmopt.compilers.deploy.base import Deployment, Emitter
from llmopt.errors import SettingsError, nearest

#: By the name that `--emit` takes.
EMITTERS: Mapping[str, str] = {
    "k8s": "llmopt.compilers.deploy.kubernetes:emit",
    "lmi": "llmopt.compilers.deploy.lmi:emit",
    "sagemaker": "llmopt.compilers.deploy.sagemaker:emit",
    "triton": "llmopt.compilers.deploy.triton:emit",
    "vllm": "llmopt.compilers.deploy.vllm:emit",
}


def check_names(names: Sequence[str]) -> None:
    """SettingsError for a name that EMITTERS does not have."""
    for name in names:
        if name not in EMITTERS:
            raise SettingsError(f"`compile.emit` cannot be `{name}`", hint=nearest(name, EMITTERS))


def emit(names: Sequence[str], deployment: Deployment) -> dict[str, str]:
    """The files of every emitter named, by their path in the artifact: `deploy/<name>/...`. Writes nothing.

    Raises SettingsError for what an emitter cannot deploy.
    """
    check_names(names)
    files: dict[str, str] = {}
    for name in names:
        module, function = EMITTERS[name].split(":")
        emitter: Emitter = getattr(importlib.import_module(module), function)
        files |= {f"deploy/{name}/{path}": text for path, text in emitter(deployment).items()}
    return files


def write(names: Sequence[str], deployment: Deployment, out: Path) -> None:
    """Write the files of `emit` under `out`; what begins with `#!` can be executed."""
    for path, text in emit(names, deployment).items():
        file = out / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        if text.startswith("#!"):
            file.chmod(0o755)
