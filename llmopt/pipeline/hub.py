"""Fetch what a stage reads from the Hugging Face hub, into the cache that all of its clients share.

A reference is `org/name` with an optional `@revision` (a branch, a tag or a commit). It becomes a commit first, and all
files are those of that commit. $HF_ENDPOINT, $HF_TOKEN, $HF_HOME and $HF_HUB_OFFLINE mean what they mean to the other
clients. huggingface_hub is imported only once something is to be fetched.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmopt.artifacts import licenses
from llmopt.artifacts.digest import is_read
from llmopt.artifacts.disk import byte_size
from llmopt.artifacts.manifest import FileEntry
from llmopt.artifacts.outcome import Progress
from llmopt.errors import CorruptError, LlmoptError, SettingsError

_REFERENCE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@((?!.*\.\.)\w[^@\s:]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DATASETS = "datasets:"
#: Weights that are code or that no stage reads; a repository that has nothing else is told so.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_ROWS = (".parquet", ".jsonl", ".jsonl.gz", ".json.gz")
#: Whole files of a data set are fetched in the order of their names until there is this much: far more text than any
#: calibration reads, and not the terabytes that some have.
_ENOUGH_BYTES = 64 << 20
_SAY_EVERY_S = 5.0

Kind = Literal["model", "dataset"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What a user named; `part` is what of a data set: `split`, or `folder/split`."""

    kind: Kind
    name: str
    revision: str = "main"
    part: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference | None:
        """From `org/name[@revision]` or `datasets:org/name[@revision][:part]`; None for what is neither."""
        if text.startswith(_DATASETS):
            name, _, part = text.removeprefix(_DATASETS).partition(":")
            found = _REFERENCE.fullmatch(name)
            if found is None:
                raise SettingsError(
                    f"`{text}` names no data set", hint="write `datasets:ORG/NAME`, then `@REVISION` and `:SPLIT`"
                )
            return cls(kind="dataset", name=found[1], revision=found[2] or "main", part=part or None)
        found = _REFERENCE.fullmatch(text)
        return None if found is None else cls(kind="model", name=found[1], revision=found[2] or "main")

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return (_DATASETS if self.kind == "dataset" else "") + self.name + at + (f":{self.part}" if self.part else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Files of one commit in the cache. `source` names them for good: `hf:org/name@<commit>`."""

    folder: Path
    source: str
    files: tuple[str, ...]


def fetch_model(reference: Reference, progress: Progress, *, accept: Callable[[Path], None] | None = None) -> Snapshot:
    """A checkpoint: config, tokenizer, templates, licence, and the safetensors that the index names.

    Its card comes along for the licence that it states, and is no part of it, nor is it missed. `accept` is called with
    the folder before the weights are in it, and may raise.
    """
    repository = _Repository.open(reference, progress)
    names = [name for name in repository.sizes if is_read(name, "model") and not name.endswith(".safetensors")]
    single, index = "model.safetensors", "model.safetensors.index.json"
    if single not in repository.sizes and index not in repository.sizes:
        raise _no_weights(repository, single)
    if "config.json" not in names:
        raise repository.lacks("`config.json`", "is it an adapter? give the model it was made for")
    repository.fetch(names, beside=repository.card)
    if accept is not None:
        accept(repository.folder)
    if single in repository.sizes:
        shards = [single]
    else:
        shards = _shards(repository.folder / index)
        if any(not name.endswith(".safetensors") for name in shards):
            raise _no_weights(repository, single)
        missing = [name for name in shards if name not in repository.sizes]
        if missing:
            raise repository.lacks(f"`{missing[0]}`, which its index names", "is its upload complete?")
    return repository.fetch(shards)


def fetch_config(reference: Reference, progress: Progress) -> Path:
    """The config.json of a checkpoint, with what says beside it how it is quantized, and no weights."""
    repository = _Repository.open(reference, progress)
    if "config.json" not in repository.sizes:
        raise repository.lacks("`config.json`", "is it an adapter? give the model it was made for")
    beside = ("hf_quant_config.json", "quantize_config.json")
    return (
        repository.fetch(["config.json", *(name for name in beside if name in repository.sizes)]).folder / "config.json"
    )


def fetch_adapter(reference: Reference, progress: Progress) -> Snapshot:
    """A PEFT adapter: its configuration and weights."""
    repository = _Repository.open(reference, progress)
    config, weights = ADAPTER_FILES
    if config not in repository.sizes:
        raise repository.lacks(f"`{config}`", "give the adapter, not the model it was made for")
    if weights not in repository.sizes:
        raise _no_weights(repository, weights)
    return repository.fetch(ADAPTER_FILES, beside=repository.licences)


def fetch_dataset(reference: Reference, progress: Progress) -> Snapshot:
    """The first files (parquet or JSON lines) of a data set's split, `train` if none is named."""
    repository = _Repository.open(reference, progress)
    found = _of_part(reference, [name for name in sorted(repository.sizes) if name.endswith(_ROWS)])
    names: list[str] = []
    total = 0
    for name in found:
        if names and total >= _ENOUGH_BYTES:
            break
        names.append(name)
        total += repository.sizes[name] or 0
    return repository.fetch(names, beside=repository.licences)


def check(snapshot: Snapshot, entries: Iterable[FileEntry]) -> None:
    """Compare what was read with the digests that the cache names large files by; CorruptError where one differs."""
    for entry in entries:
        blob = (snapshot.folder / entry.path).resolve()
        if _SHA256.fullmatch(blob.name) and blob.name != entry.sha256:
            raise CorruptError(
                f"`{blob}` is damaged in the cache of the hub", hint="delete it, and run the command again"
            )


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(slots=True)
class _Repository:
    """One commit: the files that it has with their sizes (None where that is not known) and where they come to lie."""

    reference: Reference
    commit: str
    sizes: Mapping[str, int | None]
    folder: Path
    fetched: list[str]
    progress: Progress
    offline: bool

    @classmethod
    def open(cls, reference: Reference, progress: Progress) -> _Repository:
        from huggingface_hub import HfApi, constants

        cache = Path(constants.HF_HUB_CACHE) / f"{reference.kind}s--{reference.name.replace('/', '--')}"
        if not constants.HF_HUB_OFFLINE:
            try:
                with _quiet(), _told(reference):
                    info = HfApi().repo_info(
                        reference.name, repo_type=reference.kind, revision=reference.revision, files_metadata=True
                    )
            except _UnreachableError as error:
                found = cls._cached(reference, cache, progress)
                if found is None:
                    raise
                progress(f"{error.message}: using the copy of {reference} from before, commit {found.commit[:7]}")
                return found
            _remember(cache, reference.revision, str(info.sha))
            sizes = {file.rfilename: file.size for file in getattr(info, "siblings", None) or ()}
            return cls(reference, str(info.sha), sizes, cache / "snapshots" / str(info.sha), [], progress, False)
        found = cls._cached(reference, cache, progress)
        if found is None:
            raise LlmoptError(
                f"`{reference}` is neither here nor in the cache of the hub, and HF_HUB_OFFLINE forbids to fetch it",
                hint="check the spelling, unset HF_HUB_OFFLINE, or set HF_HOME to the folder of a cache that has it",
            )
        return found

    @classmethod
    def _cached(cls, reference: Reference, cache: Path, progress: Progress) -> _Repository | None:
        """What was fetched before, by whichever client."""
        commit = reference.revision
        if not _COMMIT.fullmatch(commit):
            try:
                commit = (cache / "refs" / commit).read_text().strip()
            except OSError:
                return None
        folder = cache / "snapshots" / commit
        files = [path for path in folder.rglob("*") if path.is_file()] if _COMMIT.fullmatch(commit) else []
        if not files:
            return None
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        return cls(reference, commit, sizes, folder, [], progress, True)

    @property
    def card(self) -> tuple[str, ...]:
        return (licenses.CARD,) if licenses.CARD in self.sizes else ()

    @property
    def licences(self) -> tuple[str, ...]:
        """The card and the licence files, of what is no model, in which these are files like the others."""
        found = (name for name in self.sizes if name.startswith(licenses.FILES + licenses.NOTICES) and "/" not in name)
        return (*self.card, *found)

    def fetch(self, names: Sequence[str], *, beside: Sequence[str] = ()) -> Snapshot:
        """Bring these files into the cache as far as they are not; whole, or an error. Those `beside` do not count."""
        wanted = [name for name in (*names, *beside) if not (self.folder / name).exists()]
        if wanted:
            self._check_space(wanted)
            total = sum(self.sizes[name] or 0 for name in wanted)
            self.progress(f"fetching {self.reference} at {self.commit[:7]}: {len(wanted)} files, {byte_size(total)}")
            said = _Said(self.progress, total)
            for name in wanted:
                self._download(name, said)
        self.fetched += names
        prefix = "datasets/" if self.reference.kind == "dataset" else ""
        return Snapshot(
            folder=self.folder,
            source=f"hf:{prefix}{self.reference.name}@{self.commit}",
            files=tuple(sorted(self.fetched)),
        )

    def _download(self, name: str, said: _Said) -> None:
        from huggingface_hub import hf_hub_download

        with _quiet(), _told(self.reference, name):
            hf_hub_download(
                self.reference.name,
                name,
                repo_type=self.reference.kind,
                revision=self.commit,
                tqdm_class=said.bar(name),
            )

    def _check_space(self, names: Sequence[str]) -> None:
        import shutil

        there = next(path for path in self.folder.parents if path.exists())
        needed, free = sum(self.sizes[name] or 0 for name in names), shutil.disk_usage(there).free
        if needed > free:
            raise _full(self.reference, f", {byte_size(free)} free where {byte_size(needed)} are needed")

    def lacks(self, what: str, hint: str) -> LlmoptError:
        """The error for a file that is not there."""
        if self.offline:
            return LlmoptError(
                f"the cached copy of `{self.reference}` lacks {what}", hint="fetch the rest: run it with a network"
            )
        return LlmoptError(f"`{self.reference}` has no {what}", hint=hint)


class _Said:
    """Turns huggingface_hub's bars into a line every few seconds."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._done: dict[str, int] = {}
        self._next_s = time.monotonic() + _SAY_EVERY_S

    def bar(self, name: str) -> Any:
        """A class of bars that draw nothing: huggingface_hub asks for one that is tqdm's.

        It may make two for one file, of its bytes and of the fewer on the wire: the one that is further counts.
        """
        from tqdm.std import tqdm  # type: ignore[import-untyped]

        at = self._at

        class Bar(tqdm):  # type: ignore[misc]
            monitor_interval = 0

            def __init__(self, *args: Any, **options: Any) -> None:
                options.pop("name", None)
                super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

            def display(self, *_: object, **__: object) -> bool:
                return True

            def update(self, n: float | None = 1) -> None:
                super().update(n)
                at(name, int(self.n))

        return Bar

    def _at(self, name: str, count: int) -> None:
        self._done[name] = max(count, self._done.get(name, 0))
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _SAY_EVERY_S
            done = sum(self._done.values())
            self._progress(f"fetching {name}: {byte_size(done)} of {byte_size(self._total)}")


class _UnreachableError(LlmoptError):
    """The hub gave no answer."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of huggingface_hub's logger, which go to stderr: what fails is raised, and told by us."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _told(reference: Reference, file: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into what a user can act on."""
    try:
        yield
    except Exception as error:
        told = _explain(error, reference, file)
        if told is None:
            raise
        raise told from error


def _explain(error: BaseException, reference: Reference, file: str | None) -> LlmoptError | None:
    from huggingface_hub import errors

    chain = list(_causes(error))
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return _full(reference)
    token = "accept its terms on the hub, and set HF_TOKEN to a token that may read it"
    for cause in chain:
        if isinstance(cause, errors.GatedRepoError):
            return LlmoptError(f"`{reference}` is gated: this account may not read it", hint=token)
        if isinstance(cause, errors.RevisionNotFoundError):
            return LlmoptError(
                f"`{reference.name}` has no revision `{reference.revision}`", hint="a branch, a tag or a full commit"
            )
        if isinstance(cause, errors.RepositoryNotFoundError):
            here = f"no folder `{reference}` is here, and " if reference.kind == "model" else ""
            return LlmoptError(
                f"{here}the hub has no {reference.kind} `{reference.name}`, or it is private",
                hint="check the spelling; for a private one set HF_TOKEN",
            )
        if isinstance(cause, errors.HfHubHTTPError):
            return _of_status(cause, reference, token)
    if "onsistency check failed" in str(error):
        return LlmoptError(
            f"`{file}` of `{reference}` came truncated", hint="run the command again: it goes on where it stopped"
        )
    if isinstance(error, errors.HFValidationError):
        return SettingsError(f"`{reference}` is no id of the hub: {error}", hint="write `ORG/NAME`")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return LlmoptError(
            f"the cache of the hub cannot be written: {error.strerror}", hint="set HF_HOME to another folder"
        )
    if any(isinstance(e, OSError) or type(e).__module__.partition(".")[0].startswith("http") for e in chain):
        return _UnreachableError(
            f"the Hugging Face hub cannot be reached ({_endpoint()})",
            hint="check network, proxy and HF_ENDPOINT, or give the folder of a model",
        )
    return None


def _of_status(error: Any, reference: Reference, token: str) -> LlmoptError:
    status = error.response.status_code
    if status in (401, 403):
        return LlmoptError(f"the hub refuses to show `{reference}` ({status})", hint=token)
    if status >= 500:
        return _UnreachableError(f"the hub has trouble of its own ({status} of {_endpoint()})", hint="try again later")
    hint = "wait a little" if status == 429 else "does HF_ENDPOINT speak the protocol of the hub?"
    return LlmoptError(f"the hub answers {status} for `{reference}`", hint=hint)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _full(reference: Reference, figures: str = "") -> LlmoptError:
    from huggingface_hub import constants

    return LlmoptError(
        f"too little space for `{reference}` on the disk of the cache `{constants.HF_HUB_CACHE}`{figures}",
        hint="free some space, or set HF_HOME to a folder on another disk",
    )


def _remember(cache: Path, revision: str, commit: str) -> None:
    """Note in the cache which commit a branch was at, as every client does, for when there is no network."""
    if _COMMIT.fullmatch(revision):
        return
    with suppress(OSError):  # a cache that cannot be written is told by the download, if there is one
        ref = cache / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def _no_weights(repository: _Repository, wanted: str) -> LlmoptError:
    reference = repository.reference
    other = sorted(name for name in repository.sizes if name.endswith(_OTHER_WEIGHTS))
    if other:
        from llmopt.models.checkpoint import PICKLES, unpickling

        pickled = next((name for name in other if name.endswith(PICKLES)), None)
        hint = "look for a repository with safetensors"
        if pickled is not None and reference.kind == "model" and wanted.startswith("model"):
            hint += f", or {unpickling(reference.name, reference.name.rpartition('/')[2])}"
        return LlmoptError(
            f"`{reference}` has its weights only as `{pickled or other[0]}`, which llmopt does not read", hint=hint
        )
    return repository.lacks(f"`{wanted}`", "give a repository with safetensors weights")


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LlmoptError(f"`{index.name}` of the hub is no index of weights", hint="is its upload complete?") from None
    return sorted(str(name) for name in names)


def _of_part(reference: Reference, names: Sequence[str]) -> list[str]:
    """The files of the split that `reference` names, all from one folder (a configuration of the data set)."""
    if not names:
        raise LlmoptError(
            f"`{reference}` has no parquet and no JSON lines",
            hint=f"many data sets have parquet at another revision: `datasets:{reference.name}@refs/convert/parquet`",
        )
    folder, _, split = (reference.part or "train").rpartition("/")
    pattern = re.compile(rf"(^|/){re.escape(split)}([-_./]|$)")
    found = [name for name in names if pattern.search(name) and (not folder or folder in name.split("/")[:-1])]
    if not found and reference.part is None and len({Path(name).parent for name in names}) == 1:
        found = list(names)  # no splits at all
    configurations = sorted({name.rpartition("/")[0].removesuffix(f"/{split}") for name in found})
    if found and len(configurations) == 1:
        return found
    known = sorted({name.rpartition("/")[0] or name for name in names})
    raise SettingsError(
        f"`{reference}` has {'several parts' if found else 'no files'} of the split `{split}`",
        hint="write `:SPLIT` or `:FOLDER/SPLIT`; it has " + ", ".join(f"`{name}`" for name in known[:12]),
    )
