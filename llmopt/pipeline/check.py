"""Quantize one block of a stored artifact again, from what its manifest says, and compare."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts.manifest import Action
from llmopt.artifacts.outcome import Json, Progress
from llmopt.errors import LlmoptError, SettingsError
from llmopt.pipeline import machine, provenance
from llmopt.pipeline.inputs import Input
from llmopt.pipeline.reproduce import bfloat16

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What came of it: `differing` names the tensors of the block that came out other than they are stored.

    `otherwise` says what is not as it was when the artifact was made, and may explain them.
    """

    artifact: str
    block: int
    blocks: int
    differing: tuple[str, ...]
    otherwise: tuple[str, ...]

    def to_json(self) -> dict[str, Json]:
        return {**vars(self), "differing": list(self.differing), "otherwise": list(self.otherwise)}


def check_quantized(
    store: Store,
    source: Input,
    artifact: str,
    progress: Progress,
    *,
    adapter: Input | None = None,
    block: int | None = None,
    memory_bytes: int | None = None,
) -> Checked:
    """Block `block`, by default a random one, of `artifact` (a full id), which was made from `source`.

    The blocks before it are taken as the artifact has them: what is checked is that this block follows from them.
    """
    from llmopt import quantizers
    from llmopt.models.checkpoint import Checkpoint
    from llmopt.models.config import DecoderConfig

    action = store.get(artifact).action
    if action is None or not action.op.startswith("quantize.") or action.op == "quantize.convert":
        raise SettingsError(f"`{artifact[:19]}` is no quantized model", hint="see `llmopt store ls`")
    for name, given in (("model", source), ("adapter", adapter)):
        if action.inputs.get(name) != (None if given is None else given.id):
            what = given.label if given is not None else f"a {name} that is not given"
            raise SettingsError(f"`{artifact[:19]}` was not made from `{what}`", hint="see `llmopt store show`")
    settings = quantizers.resolve(dict(action.settings))
    assert isinstance(settings, quantizers.QuantizeSettings)
    path = store.path(artifact)
    layers = DecoderConfig.read(Checkpoint.open(path)).layers
    number = secrets.randbelow(layers) if block is None else block
    if not 0 <= number < layers:
        raise SettingsError(f"there is no block {number}", hint=f"the model has the blocks 0 to {layers - 1}")
    execution = quantizers.Execution(bfloat16=bool(bfloat16(action)), memory_bytes=memory_bytes)
    progress(f"checking block {number} of {layers}")
    with store.stage() as scratch:
        differing = quantizers.check_block(
            source.path,
            settings,
            _calibration(store, action.inputs),
            path,
            number,
            scratch,
            progress,
            execution,
            adapter=None if adapter is None else adapter.path,
        )
    return Checked(
        artifact=artifact, block=number, blocks=layers, differing=tuple(differing), otherwise=tuple(_otherwise(action))
    )


def _calibration(store: Store, inputs: Mapping[str, str]) -> Path | None:
    found = inputs.get("calibration")
    if found is None:
        return None
    try:
        return store.path(found)
    except LlmoptError as error:
        raise LlmoptError(
            f"the calibration set `{found[:19]}` is not in the store: {error.message}",
            hint="quantize once in this store, or copy the set into it",
        ) from error


def _otherwise(action: Action) -> list[str]:
    """What the artifact was made with that is other here."""
    here: dict[str, str] = {**machine.arithmetic(), "code": provenance.code_digest("quantize")}
    here |= {name: provenance.installed(name) or "missing" for name in action.deps}
    then: dict[str, str] = {**action.deps, **action.target, "code": action.code}
    return [
        f"{name}: {then[name][:19]} then, {here[name][:19]} here"
        for name in then
        if here.get(name, then[name]) != then[name]
    ]
