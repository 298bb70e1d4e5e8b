"""What changes the bits of a result beside its inputs, settings and target: our code and the libraries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from llmopt.errors import BackendMissingError

_PACKAGE = Path(__file__).parents[1]

#: Of checkpoints that a runtime loads as they are, or nearly.
_CHECKS = ("compilers/hub_model", "compilers/inspection", "compilers/model_check")
#: The code that each operation runs, as paths in the package; a change in any of it gives other keys.
SOURCES: Mapping[str, tuple[str, ...]] = {
    "calibrate": ("calibrate", "models/text", "models/chat"),
    "quantize": ("quantizers", "formats", "models"),
    "compile.openvino": ("compilers/ov", "formats", "models"),
    "compile.tensorrt-llm": ("compilers/trt_llm", "compilers/deploy", *_CHECKS, "planner", "formats", "models"),
    "compile.vllm": ("compilers/vllm_target", "compilers/deploy", *_CHECKS, "planner", "formats", "models"),
    "eval": ("evaluate", "harness", "formats", "models"),
    "bench": ("bench", "serve", "models/chat"),
}


@cache
def code_digest(operation: str) -> str:
    """One digest over the names and bytes of the files that `operation` runs."""
    digest = hashlib.sha256()
    for file in _files(SOURCES[operation]):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{content}  {file.relative_to(_PACKAGE).as_posix()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _files(sources: Iterable[str]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        path = _PACKAGE / source
        inside = path.rglob("*") if path.is_dir() else [path.with_suffix(".py")]
        files += [f for f in inside if f.is_file() and "__pycache__" not in f.parts and not f.name.startswith(".")]
    return sorted(files)


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """The installed version of each; BackendMissingError for one that is not installed. Imports none of them."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            raise BackendMissingError(
                f"the package `{name}` is not installed",
                hint=f"`pip install {name}`; `llmopt doctor` lists what is here",
            ) from None
    return found


def installed(distribution: str) -> str | None:
    """Its version, or None."""
    try:
        return versions([distribution])[distribution]
    except BackendMissingError:
        return None
