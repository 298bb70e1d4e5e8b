"""What a stage works on: a folder of files with a known digest, found from what a user wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts import licenses
from llmopt.artifacts.digest import describe, describe_all
from llmopt.artifacts.licenses import Stated
from llmopt.artifacts.manifest import MANIFEST_NAME
from llmopt.artifacts.objects import is_s3
from llmopt.artifacts.outcome import Progress, silent
from llmopt.errors import LlmoptError, SettingsError, nearest
from llmopt.pipeline.runner import StageResult

if TYPE_CHECKING:
    from llmopt.artifacts.manifest import Manifest
    from llmopt.artifacts.remote.plain import Prefix
    from llmopt.artifacts.store import Store
    from llmopt.pipeline.hub import Reference, Snapshot

_KINDS = {
    "model": "a checkpoint",
    "quantized-model": "a quantized model",
    "engine": "an engine",
    "plan": "the plan of an engine",
    "report": "a report",
    "calibration": "a calibration set",
}
_TEXTS = ("text", "rows", "calibration", "tasks")
#: Files of which every row is a text or a conversation; any other file is one text.
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """`id` names the bytes under `path`, which were read to find or to check it; `label` is for people.

    `source` says where it was fetched from, if it was: `hf:org/name@<commit>`. `files` are those of a calibration text.
    `stated` is what its card, its licence files or its manifest say of its licence.
    """

    id: str
    path: Path
    kind: str
    bytes: int
    label: str
    source: str | None = None
    files: tuple[Path, ...] = ()
    stated: tuple[Stated, ...] = ()

    @property
    def license(self) -> str | None:
        """As in a card (`apache-2.0`); several joined by ` AND `; None where none is stated."""
        return licenses.join(stated.license for stated in self.stated)


def resolve(store: Store, reference: str, progress: Progress = silent, *, deny: Sequence[str] = ()) -> Input:
    """The folder, the prefix of a bucket, or the stored artifact that a user's `reference` names; its bytes checked.

    Raises CorruptError for an artifact that is damaged, LlmoptError for what is not there. What `deny` says of
    licences is asked of a model card before what lies beside it is fetched.
    """
    if is_s3(reference):
        return _from_s3(store, reference, progress, deny)
    path = Path(reference)
    if path.is_dir():
        return _folder(path)
    artifact = store.resolve(reference) if "/" not in reference else None
    if artifact is None:
        raise _not_found(store, reference)
    return stored(store, artifact, label=reference)


def stored(store: Store, artifact: str, *, label: str | None = None) -> Input:
    """The artifact of a full id, its bytes checked."""
    manifest, path = store.get(artifact), store.path(artifact)
    return _input(manifest, path, label or artifact[:19], stated=_stated(manifest, path))


def model(store: Store, reference: str, progress: Progress = silent, *, deny: Sequence[str] = ()) -> Input:
    """As `resolve`; what is neither a folder nor in the store may be a model of the Hugging Face hub.

    One whose licence `deny` names is refused, one of the hub before its weights are fetched.
    """
    wanted = _of_hub(reference)
    if wanted is None:
        found = resolve(store, reference, progress, deny=deny)
        refuse_denied((found,), deny)
        return found
    from llmopt.pipeline import hub

    def accept(folder: Path) -> None:
        _refuse_denied(str(wanted), licenses.of_folder(folder), deny)

    return _snapshot(hub.fetch_model(wanted, progress, accept=accept), "model", wanted)


def adapter(reference: str, progress: Progress = silent) -> Input:
    """A PEFT adapter: a folder, or one of the hub. Only its configuration and its weights count."""
    from llmopt.pipeline import hub

    wanted = _of_hub(reference)
    if wanted is not None:
        return _snapshot(hub.fetch_adapter(wanted, progress), "adapter", wanted)
    _refuse_s3(reference, "an adapter")
    folder = Path(reference)
    for name in hub.ADAPTER_FILES:
        if not (folder / name).is_file():
            pickled = name.endswith(".safetensors") and (folder / "adapter_model.bin").is_file()
            raise LlmoptError(
                f"no `{name}` in the adapter `{reference}`",
                hint="save it with safetensors: it has its weights as a pickle only"
                if pickled
                else "give the folder that peft's `save_pretrained` wrote, or the hub's `ORG/NAME`",
            )
    stated = licenses.of_folder(folder)
    return _input(describe(folder, "adapter", only=hub.ADAPTER_FILES), folder, folder.resolve().name, stated=stated)


def calibration(store: Store, reference: str, progress: Progress = silent) -> Input:
    """What to calibrate on: a calibration set, or (kind `text` or `rows`) a file or a data set to make one from."""
    if reference.startswith("datasets:"):
        from llmopt.pipeline import hub

        wanted = hub.Reference.parse(reference)
        assert wanted is not None
        return _snapshot(hub.fetch_dataset(wanted, progress), "rows", wanted)
    path = Path(reference)
    if is_s3(reference):
        from llmopt.artifacts.remote import plain

        path = plain.read_file(store, reference, progress) or path
    if path.is_file():
        return text(path, kind="rows" if path.name.endswith(ROW_SUFFIXES) else "text")
    if not is_s3(reference) and not path.is_dir() and ("/" in reference or store.resolve(reference) is None):
        raise LlmoptError(
            f"no text file at `{reference}`, and no calibration set of that name",
            hint="give a UTF-8 text, a .jsonl or .parquet file, `datasets:ORG/NAME`, or an artifact of the store",
        )
    found = resolve(store, reference, progress)
    if found.kind != "calibration":
        raise SettingsError(
            f"`{reference}` is {_KINDS.get(found.kind, found.kind)}, not a calibration set",
            hint="give a text file, or an artifact that `llmopt quantize` made of one",
        )
    return found


def subject(store: Store, reference: str, progress: Progress = silent) -> Input | str:
    """What a bench loads: the URL of a server as it is, anything else resolved."""
    if reference.startswith(("http://", "https://")):
        return reference
    if not is_s3(reference) and not Path(reference).is_dir() and ("/" in reference or store.resolve(reference) is None):
        raise _no_subject(store, reference)
    return resolve(store, reference, progress)


def report(store: Store, reference: str | None) -> Input | None:
    """A stored report: an artifact, a folder with `report.json`, or that file itself. None for none."""
    if reference is None:
        return None
    path = Path(reference)
    if path.is_file() or (path / "report.json").is_file():
        file = path if path.is_file() else path / "report.json"
        return _input(describe(file, "report"), file, path.name)
    hint = "give what `llmopt bench` or `llmopt bench import` made: its id or name in the store, or its folder"
    if reference.startswith(("http://", "https://")):
        raise SettingsError(f"`{reference}` is a server, not a report", hint="load it too: `--against`")
    if not is_s3(reference) and not path.is_dir() and ("/" in reference or store.resolve(reference) is None):
        raise LlmoptError(f"no report at `{reference}`", hint=hint)
    found = resolve(store, reference)
    if found.kind != "report":
        raise SettingsError(f"`{reference}` is {_KINDS.get(found.kind, found.kind)}, not a report", hint=hint)
    return found


def product(result: StageResult) -> Input:
    """The input that a stage's result is for the next stage."""
    return Input(
        id=result.artifact,
        path=Path(result.path),
        kind=result.kind,
        bytes=result.bytes,
        label=result.artifact[:19],
        stated=tuple(Stated(license, "its manifest") for license in licenses.split(result.license)),
    )


def text(file: str | Path, *, kind: str = "text") -> Input:
    """A text, or a file of rows, to calibrate on or to evaluate with."""
    _refuse_s3(str(file), f"a {kind}" if kind in ("text", "timing cache", "workload") else kind)
    path = Path(file)
    if not path.is_file():
        hints = {
            "results": "give the result file of `vllm bench serve`, guidellm or aiperf",
            "timing cache": "give the `timing.cache` of an earlier build",
        }
        what = {"results": "result file", "workload": "workload file", "timing cache": kind}.get(kind, "text file")
        raise LlmoptError(f"no {what} at `{path}`", hint=hints.get(kind, "give a file of plain UTF-8 text"))
    return _input(describe(path, kind), path, path.name, files=(path,))


def tasks(folder: str | Path) -> Input:
    """A folder of lm-evaluation-harness tasks: every file in it, for YAML, code and data all change what is asked."""
    _refuse_s3(str(folder), "a folder of tasks")
    path = Path(folder)
    if not path.is_dir():
        raise LlmoptError(f"no folder of tasks at `{path}`", hint="give the folder that holds their YAML files")
    return _input(describe_all(path, "tasks"), path, path.resolve().name)


def refuse_denied(given: Iterable[Input | None], patterns: Sequence[str]) -> None:
    """Raise SettingsError for the first input whose licence a pattern of `--deny-license` names.

    `unknown` is also a model, an adapter or a data set that states none; a user's own text cannot state one.
    """
    for source in given:
        if source is not None and (source.stated or source.source or source.kind not in _TEXTS):
            _refuse_denied(source.label, source.stated, patterns)


def _refuse_denied(label: str, stated: Sequence[Stated], patterns: Sequence[str]) -> None:
    if any(not pattern.strip() for pattern in patterns):
        raise SettingsError("`--deny-license` is empty", hint="a licence or a pattern: `llama*`, `*-nc-*`, `unknown`")
    found = licenses.denied(stated, patterns)
    if found is None:
        return
    by, pattern = found
    if by is None:
        raise SettingsError(
            f"`{label}` states no licence, which `--deny-license {pattern}` denies",
            hint=f"`license:` in the front matter of its `{licenses.CARD}` states one, or a `LICENSE` beside it; what "
            "llmopt makes has that of what it is made from",
        )
    raise SettingsError(
        f"`{label}` has the licence `{by.license}` by {_named(by.where)}, which `--deny-license {pattern}` denies",
        hint="use another one, or allow the licence",
    )


def _named(where: str) -> str:
    return f"its card, `{where}`" if where == licenses.CARD else where if " " in where else f"its file `{where}`"


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
    """An engine without a manifest counts with the folders in it, which one for a GPU has."""
    kind = "engine" if (path / "engine.json").is_file() else "model"
    whole = kind == "engine" and not (path / MANIFEST_NAME).exists()
    manifest = (describe_all if whole else describe)(path, kind)
    return _input(manifest, path, path.resolve().name, stated=_stated(manifest, path))


def _stated(manifest: Manifest, path: Path) -> tuple[Stated, ...]:
    """By its manifest; where that does not say, by the licence files that came along, and by a user's folder's card."""
    return licenses.of_manifest(manifest) or licenses.of_folder(path, card=manifest.action is None)


def _from_s3(store: Store, url: str, progress: Progress, deny: Sequence[str]) -> Input:
    """What lies below a prefix, by way of the store, where it stays: the next command fetches nothing."""
    from llmopt.artifacts.remote import plain

    prefix = plain.Prefix.open(url)
    stated = prefix.licenses()
    _refuse_denied(url, stated, deny)
    if prefix.manifest is None:
        _refuse_pickles(prefix)
    return replace(stored(store, plain.read(store, prefix, progress), label=url), stated=stated)


def _refuse_pickles(prefix: Prefix) -> None:
    from llmopt.models.checkpoint import PICKLES, unpickling

    names = [found.key for found in prefix.listed]
    pickled = next((name for name in names if name.endswith(PICKLES)), None)
    if pickled is not None and not any(name.endswith(".safetensors") for name in names):
        raise LlmoptError(
            f"`{prefix.url}` has its weights only as `{pickled}`, a pickle: it can hold code, and llmopt loads none",
            hint=f"fetch them (`aws s3 sync {prefix.url} MODEL`) and {unpickling('MODEL', 'MODEL-safetensors')}",
        )


def _of_hub(reference: str) -> Reference | None:
    """The reference as one of the hub, unless it is a folder here or can only be a path."""
    if "/" not in reference or Path(reference).exists() or reference.startswith(("datasets:", ".", "~", "/")):
        return None
    from llmopt.pipeline.hub import Reference

    return Reference.parse(reference)


def _snapshot(snapshot: Snapshot, kind: str, reference: Reference) -> Input:
    from llmopt.pipeline import hub

    found = describe(snapshot.folder, kind, only=snapshot.files)
    hub.check(snapshot, found.files)
    files = tuple(snapshot.folder / name for name in snapshot.files)
    stated = licenses.of_folder(snapshot.folder)
    return _input(found, snapshot.folder, str(reference), source=snapshot.source, files=files, stated=stated)


def _input(
    manifest: Manifest,
    path: Path,
    label: str,
    *,
    source: str | None = None,
    files: tuple[Path, ...] = (),
    stated: tuple[Stated, ...] = (),
) -> Input:
    return Input(
        id=manifest.id,
        path=path,
        kind=manifest.kind,
        bytes=manifest.size,
        label=label,
        source=source,
        files=files,
        stated=stated,
    )


def _refuse_s3(reference: str, what: str) -> None:
    if is_s3(reference):
        raise SettingsError(
            f"{what} is not read from S3: `{reference}`",
            hint="fetch it first (`aws s3 cp` or `sync`); models, artifacts and texts to calibrate on are",
        )


def _no_subject(store: Store, reference: str) -> LlmoptError:
    hint = "give an engine that `llmopt compile` made (folder, prefix on S3, id or name), or a server as `http://127.0.0.1:8000`"
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", reference):
        return SettingsError(f"`{reference}` has no scheme", hint=f"write it as `http://{reference}`")
    close = nearest(reference, store.names())
    return LlmoptError(f"no engine `{reference}`", hint=close if close.startswith("did") else hint)


def _not_found(store: Store, reference: str) -> LlmoptError:
    """Say of which kind the reference is, as far as that can be seen."""
    path = Path(reference)
    if "://" in reference:
        return SettingsError(
            f"`{reference}` cannot be read: only folders and `s3://BUCKET/PREFIX` can",
            hint="download it, give the folder",
        )
    if path.is_file():
        return SettingsError(f"`{reference}` is a file", hint="give the folder that holds config.json")
    if "/" in reference:
        return LlmoptError(
            f"no model folder at `{reference}`",
            hint="give the folder that holds config.json, or `ORG/NAME` of the hub where a checkpoint is asked for",
        )
    return LlmoptError(
        f"no folder and no artifact `{reference}`",
        hint=nearest(reference, store.names()) if store.names() else "`llmopt store ls` lists the artifacts",
    )
