"""Make an artifact again from what its manifest says, and compare.

The work is done in a store of its own, beside which the user's stays as it is; only a different result of the same
action is kept there, for that action is then known not to be reproducible.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.artifacts.attestation import attest
from llmopt.artifacts.digest import describe
from llmopt.artifacts.licenses import Stated, split
from llmopt.artifacts.manifest import MANIFEST_NAME, Action, Manifest
from llmopt.artifacts.outcome import Json, Progress
from llmopt.errors import BackendMissingError, LlmoptError, SettingsError
from llmopt.pipeline import inputs, machine, runner, stages
from llmopt.pipeline.differences import compare, file_lines
from llmopt.pipeline.explain import difference
from llmopt.pipeline.inputs import Input
from llmopt.pipeline.lineage import input_names
from llmopt.profiles import CALIBRATION_TEXT, HELDOUT_TEXT

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store
    from llmopt.pipeline.runner import Stage


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """What came of it. `outcome` is `identical` (the same id), `same files` or `different`.

    `files` are those that came out other, `otherwise` what was not as it was when the artifact was made; `kept` is
    whether the new artifact is in the store, as a second result of the same action.
    """

    artifact: str
    remade: str
    outcome: str
    action: str
    remade_action: str
    files: tuple[str, ...]
    otherwise: tuple[str, ...]
    kept: bool
    seconds: float

    @property
    def same(self) -> bool:
        return self.outcome != "different"

    def to_json(self) -> dict[str, Json]:
        return {**vars(self), "files": list(self.files), "otherwise": list(self.otherwise)}


def reproduce(store: Store, artifact: str, progress: Progress, *, given: Sequence[str] = ()) -> Reproduced:
    """Make `artifact` (a full id) again. `given` are folders, texts or hub references of inputs not in the store.

    Raises SettingsError for what is not made again (an input, a measurement, what a GPU built) and for a given input
    that is none of the artifact's; LlmoptError for an input that is nowhere.
    """
    manifest = store.get(artifact)
    action = _action(manifest)
    start, started = time.monotonic(), time.time()
    stage = rebuild(store, action, _Found.of(store, action, given, progress))
    with store.stage() as folder:
        scratch = type(store.here).open(str(folder / "store"))
        result = runner.execute(scratch, stage, progress)
        remade = scratch.get(result.artifact)
        files = file_lines(manifest, remade)
        kept = bool(remade.id != manifest.id and stage.action.key == action.key)
        if kept:
            _keep(store, scratch, remade, folder / "kept", started)
    return Reproduced(
        artifact=manifest.id,
        remade=remade.id,
        outcome="identical" if remade.id == manifest.id else "different" if files else "same files",
        action=action.key,
        remade_action=stage.action.key,
        files=tuple(files),
        otherwise=(*difference(action, stage.action), *_told(manifest, remade)),
        kept=kept,
        seconds=round(time.monotonic() - start, 3),
    )


def rebuild(store: Store, action: Action, found: _Found) -> Stage:
    """The stage of an action, as it would be made here and now."""
    settings = dict(action.settings)
    op, _, detail = action.op.partition(".")
    if op == "calibrate":
        return _calibrate(action, found)
    if op == "quantize":
        return stages.quantize(
            found.need("model"), settings, found.get("calibration"), found.get("adapter"), bfloat16=bfloat16(action)
        )
    if op == "eval":
        text, tasks = found.need("text"), found.get("tasks")
        more = {"text": str(text.files[0])} | ({} if tasks is None else {"tasks_path": str(tasks.path)})
        return stages.evaluate(found.need("model"), found.get("base"), {**settings, **more})
    model = found.need("model")
    if detail.endswith(".plan"):
        return stages.compile_plan(model, settings)
    plan = found.get("plan")
    return stages.compile_(model, settings) if plan is None else stages.compile_prepare(model, plan, settings)


def bfloat16(action: Action) -> bool | None:
    """Whether a quantization was made with BF16 products; BackendMissingError where this machine has none."""
    products = action.target.get("products")
    if products == "bfloat16" and not machine.has_bfloat16():
        raise BackendMissingError("the artifact was made with BF16 products, which this machine lacks")
    return None if products is None else products == "bfloat16"


def _action(manifest: Manifest) -> Action:
    action = manifest.action
    if action is None:
        raise SettingsError(f"`{manifest.id[:19]}` was not made by llmopt", hint="see `llmopt store show`")
    if action.op in ("bench", "bench.import"):
        raise SettingsError(
            f"`{manifest.id[:19]}` is a measurement, which is another one every time",
            hint="measure again with `llmopt bench`, and compare with `--baseline`",
        )
    if action.op.endswith(".build"):
        raise SettingsError(
            f"`{manifest.id[:19]}` was built on a GPU, which gives other bytes every time",
            hint="build again with `llmopt compile --resume`; what it was prepared from can be reproduced",
        )
    if action.op.partition(".")[0] not in ("calibrate", "quantize", "compile", "eval"):
        raise SettingsError(f"`{action.op}` is no operation that this llmopt knows", hint="is it of a later version?")
    return action


@dataclass(frozen=True, slots=True)
class _Found:
    """The inputs of an action by name, each with the bytes that its id names."""

    action: Action
    inputs: Mapping[str, Input]

    @classmethod
    def of(cls, store: Store, action: Action, given: Sequence[str], progress: Progress) -> _Found:
        names = [name for name in input_names(action) if name != "chat_template"]
        offered = [_offered(store, reference, action, progress) for reference in given]
        found: dict[str, Input] = {}
        for name in names:
            of_it = offered if name != "tokenizer" else [_with_tokenizer(each, action) for each in offered]
            same = next((each for each in of_it if each is not None and each.id == action.inputs[name]), None)
            found[name] = _as_stated(same or _find(store, action, name, progress), action, name)
        for reference, each in zip(given, offered, strict=True):
            ids = {action.inputs[name]: name for name in names}
            if each.id not in ids and _with_tokenizer(each, action) is None:
                wanted = ", ".join(f"{name} `{id_}`" for id_, name in ids.items())
                raise SettingsError(
                    f"`{reference}` is `{each.id}`, and it was made from {wanted}",
                    hint="give what it was made from, unchanged; `llmopt store show --lineage` says where it was from",
                )
        return cls(action, found)

    def get(self, name: str) -> Input | None:
        return self.inputs.get(name)

    def need(self, name: str) -> Input:
        if name not in self.inputs:
            raise LlmoptError(f"`{self.action.op}` has no input `{name}`", hint="is it of a later llmopt?")
        return self.inputs[name]


def _offered(store: Store, reference: str, action: Action, progress: Progress) -> Input:
    """What the user gave, by what it looks like."""
    path = Path(reference)
    if path.is_file():
        return inputs.text(path, kind="rows" if path.name.endswith(inputs.ROW_SUFFIXES) else "text")
    if reference.startswith("datasets:"):
        return inputs.calibration(store, reference, progress)
    if (path / "adapter_config.json").is_file():
        return inputs.adapter(reference, progress)
    if path.is_dir() and "tasks" in action.inputs and not (path / "config.json").is_file():
        return inputs.tasks(path)
    return inputs.model(store, reference, progress)


def _find(store: Store, action: Action, name: str, progress: Progress) -> Input:
    """In the store, in the package, or once more from where it was fetched."""
    id_, source = action.inputs[name], action.inputs.get(f"{name}_source")
    if name == "tokenizer":
        return _tokenizer(store, id_)
    if id_ in store.ids():
        return inputs.stored(store, id_)
    for text in (CALIBRATION_TEXT, HELDOUT_TEXT) if name in ("data", "text") else ():
        if describe(text, "text").id == id_:
            return inputs.text(text)
    if source is None:
        raise LlmoptError(
            f"its {name} `{id_}` is not in the store, and was not fetched from anywhere",
            hint="give the folder or file that it was made from: `--model FOLDER`",
        )
    fetched = _fetch(store, name, source.removeprefix("hf:"), progress)
    if fetched.id != id_:
        raise LlmoptError(
            f"`{source}` is `{fetched.id}` now, and its {name} was `{id_}`",
            hint="give what it was made from: `--model FOLDER`",
        )
    return fetched


def _fetch(store: Store, name: str, reference: str, progress: Progress) -> Input:
    if name == "adapter":
        return inputs.adapter(reference, progress)
    if reference.startswith("datasets/"):
        return inputs.calibration(store, f"datasets:{reference.removeprefix('datasets/')}", progress)
    return inputs.model(store, reference, progress)


def _tokenizer(store: Store, id_: str) -> Input:
    """Any artifact that has this tokenizer: of the model, a calibration set depends on nothing else."""
    for manifest, _ in store.ls():
        if any(entry.path == "tokenizer.json" and f"sha256:{entry.sha256}" == id_ for entry in manifest.files):
            return dataclasses.replace(inputs.stored(store, manifest.id), id=id_, kind="model")
    raise LlmoptError(
        f"nothing in the store has the tokenizer `{id_[:19]}` that it was made with",
        hint="give the model that it was made for: `--model FOLDER`",
    )


def _with_tokenizer(model: Input, action: Action) -> Input | None:
    """The model under the id of its tokenizer, if that is the one of the action."""
    file, wanted = model.path / "tokenizer.json", action.inputs.get("tokenizer")
    if wanted is None or not file.is_file():
        return None
    return dataclasses.replace(model, id=wanted) if stages.tokenizer_id(model.path) == wanted else None


def _as_stated(found: Input, action: Action, name: str) -> Input:
    """With what the action says of it: the bytes are the same, wherever they were found this time."""
    license = action.inputs.get(f"{name}_license")
    stated = tuple(Stated(each, "its manifest") for each in split(license))
    return dataclasses.replace(found, source=action.inputs.get(f"{name}_source"), stated=stated)


def _calibrate(action: Action, found: _Found) -> Stage:
    """Its check is left out: that is of the quantization which was asked for then."""
    names = {"samples": "samples", "seq_len": "seq_len", "seed": "seed", "field": "calib_field"}
    own = {key: action.settings[name] for name, key in names.items() if action.settings.get(name) is not None}
    data = dataclasses.replace(found.need("data"), kind=str(action.settings["packing"]))
    stage = stages.calibrate(found.need("tokenizer"), data, {"method": "rtn", **own})
    return dataclasses.replace(stage, check=lambda: None)


def _told(before: Manifest, after: Manifest) -> list[str]:
    """What the manifests say that is no file and not in the action."""
    said = compare(before, after)
    lines: list[str] = []
    for part in ("status", "kind"):
        pair: Any = said[part]
        lines += [] if pair is None else [f"{part}: {pair['a']} -> {pair['b']}"]
    metrics: Any = said["metrics"]
    lines += [f"metrics.{name}: {pair['a']} -> {pair['b']}" for name, pair in metrics.items()]
    events: Any = said["events"]
    return lines + [f"event {what}: {event}" for what in ("added", "removed") for event in events[what]]


def _keep(store: Store, scratch: Store, remade: Manifest, folder: Path, started: float) -> None:
    """Put the artifact of the scratch store into the user's, beside the other result of its action."""
    scratch.export(remade.id, folder)
    (folder / MANIFEST_NAME).unlink()
    try:
        store.put(
            folder,
            kind=remade.kind,
            action=remade.action,
            status=remade.status,
            events=remade.events,
            metrics=remade.metrics,
            attestation=lambda manifest: attest(manifest, started=started, finished=time.time()),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
