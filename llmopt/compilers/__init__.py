"""Compilers: a checkpoint, plain or quantized, becomes an engine that a runtime serves.

A target is a frozen dataclass of its own settings with the work as methods (`base.Target`). Nothing is imported here
before a target is named, and a target imports its backend only when it compiles.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.artifacts.outcome import Outcome, Progress
from llmopt.compilers.base import Direct, Target
from llmopt.errors import SettingsError, nearest
from llmopt.profiles.settings import build

#: By the name a user gives.
TARGETS: Mapping[str, str] = {
    "openvino": "llmopt.compilers.ov.target:OpenVINO",
    "tensorrt-llm": "llmopt.compilers.trt_llm.target:TensorRTLLM",
    "vllm": "llmopt.compilers.vllm_target:VLLM",
}
DEFAULT_TARGET = "openvino"

OP_VERSION = 2


def resolve(settings: Mapping[str, Any]) -> Target:
    """The target that `settings["target"]` names, with the other settings checked and every default spelled out."""
    name = str(settings.get("target", DEFAULT_TARGET))
    if name not in TARGETS:
        raise SettingsError(f"unknown target `{name}`", hint=nearest(name, TARGETS))
    target = _load(name)
    for key in settings.keys() - _fields(target):
        others = [f"`{other}`" for other in TARGETS if key in _fields(_load(other))]
        if others:
            raise SettingsError(
                f"the target `{name}` has no setting `{key}`", hint=f"it is one of `--target` {' or '.join(others)}"
            )
    found: Target = build(target, settings, where="compile")
    return found


def _load(name: str) -> type[Any]:
    module, attribute = TARGETS[name].split(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


def _fields(target: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(target)}


def deps(settings: Target) -> tuple[str, ...]:
    """The distributions whose versions change the bits of the engine."""
    return settings.deps()


def check(model: Path, settings: Target) -> None:
    """Everything that can be known before any work, from small files and headers; raises LlmoptError."""
    settings.check(model)


def compile_model(model: Path, settings: Direct, out: Path, progress: Progress) -> Outcome:
    """Check `model` and write its engine into the empty folder `out`. The same inputs give the same bytes."""
    return settings.compile(model, out, progress)
