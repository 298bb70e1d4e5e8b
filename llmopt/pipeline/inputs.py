"""What a stage works on: a folder of files with a known digest, found from what a user wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts.digest import describe, describe_all
from llmopt.errors import LlmoptError, SettingsError, nearest
from llmopt.pipeline.runner import StageResult

if TYPE_CHECKING:
    from llmopt.artifacts.manifest import Manifest
    from llmopt.artifacts.store import Store

_KINDS = {"model": "a checkpoint", "quantized-model": "a quantized model", "engine": "an engine", "report": "a report"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """`id` names the bytes under `path`, which were read to find or to check it; `label` is for people."""

    id: str
    path: Path
    kind: str
    bytes: int
    label: str


def resolve(store: Store, reference: str) -> Input:
    """The folder, or the stored artifact (its bytes checked), that a user's `reference` names.

    Raises CorruptError for an artifact that is damaged, LlmoptError for what is not there.
    """
    path = Path(reference)
    if path.is_dir():
        return _folder(path)
    artifact = store.resolve(reference) if "/" not in reference else None
    if artifact is None:
        raise _not_found(store, reference)
    return _input(store.get(artifact), store.path(artifact), reference)


def subject(store: Store, reference: str) -> Input | str:
    """What a bench loads: the URL of a server as it is, anything else resolved."""
    return reference if reference.startswith(("http://", "https://")) else resolve(store, reference)


def product(result: StageResult) -> Input:
    """The input that a stage's result is for the next stage."""
    return Input(
        id=result.artifact, path=Path(result.path), kind=result.kind, bytes=result.bytes, label=result.artifact[:19]
    )


def text(file: str | Path) -> Input:
    """A calibration or evaluation text."""
    path = Path(file)
    if not path.is_file():
        raise LlmoptError(f"no text file at `{path}`", hint="give a file of plain UTF-8 text")
    return _input(describe(path, "calibration"), path, path.name)


def tasks(folder: str | Path) -> Input:
    """A folder of lm-evaluation-harness tasks: every file in it, for YAML, code and data all change what is asked."""
    path = Path(folder)
    if not path.is_dir():
        raise LlmoptError(f"no folder of tasks at `{path}`", hint="give the folder that holds their YAML files")
    return _input(describe_all(path, "tasks"), path, path.resolve().name)


def require(source: Input, command: str, *kinds: str) -> None:
    """Refuse an input that the command is not for."""
    if source.kind in kinds:
        return
    wanted = " or ".join(_KINDS[kind] for kind in kinds)
    made_by = {"engine": "make one: `llmopt compile {}`"}.get(kinds[0])
    raise SettingsError(
        f"`llmopt {command}` takes {wanted}, and `{source.label}` is {_KINDS.get(source.kind, source.kind)}",
        hint=made_by.format(source.label) if made_by and source.kind != "report" else None,
    )


def _folder(path: Path) -> Input:
    kind = "engine" if (path / "engine.json").is_file() else "model"
    return _input(describe(path, kind), path, path.resolve().name)


def _input(manifest: Manifest, path: Path, label: str) -> Input:
    return Input(id=manifest.id, path=path, kind=manifest.kind, bytes=manifest.size, label=label)


def _not_found(store: Store, reference: str) -> LlmoptError:
    """Say of which kind the reference is, as far as that can be seen."""
    path = Path(reference)
    if "://" in reference:
        return SettingsError(
            f"`{reference}` cannot be read: only local folders can", hint="download it, give the folder"
        )
    if path.is_file():
        return SettingsError(f"`{reference}` is a file", hint="give the folder that holds config.json")
    parts = reference.split("/")
    if len(parts) == 2 and all(parts) and not reference.startswith((".", "~")):
        return LlmoptError(
            f"no folder `{reference}`, and models are not fetched from the Hugging Face hub yet",
            hint="download it (`hf download ORG/NAME --local-dir FOLDER`), and give the folder",
        )
    if len(parts) > 1:
        return LlmoptError(f"no model folder at `{reference}`", hint="give the folder that holds config.json")
    return LlmoptError(
        f"no folder and no artifact `{reference}`",
        hint=nearest(reference, store.names()) if store.names() else "`llmopt store ls` lists the artifacts",
    )
