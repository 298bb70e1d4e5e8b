"""Run a stage: look for its result in the store, else do the work and publish it.

A hit is verified before it is believed. What turns out to be damaged is said aloud and made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts import licenses
from llmopt.artifacts.attestation import attest
from llmopt.artifacts.manifest import Action, Manifest
from llmopt.artifacts.outcome import Json, Outcome, Progress
from llmopt.artifacts.trust import signing
from llmopt.errors import CorruptError, LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store


@dataclass(frozen=True, kw_only=True)
class Stage:
    """An action and what carries it out. `check` finds what is wrong before the work, from small files only."""

    kind: str
    action: Action
    check: Callable[[], None]
    produce: Callable[[Path, Progress], Outcome]
    repeatable: bool = True  # the same action gives the same bytes; a measurement does not
    resumable: bool = False  # `produce` goes on from what an earlier one, ended early, left in its folder


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage came to; its fields are those of `--json`.

    `path` is a folder of the store, to be read only. `seconds` is what this process spent on it, a look-up included.
    `license` is what it inherits from its inputs. `reproducible` is false once the same action has given two different
    results.
    """

    artifact: str
    action: str
    cached: bool
    kind: str
    status: str
    path: str
    bytes: int
    seconds: float
    metrics: Mapping[str, Json]
    events: tuple[str, ...]
    license: str | None
    reproducible: bool

    def to_json(self) -> dict[str, Json]:
        return {**vars(self), "metrics": dict(self.metrics), "events": list(self.events)}


def run(
    store: Store, stage: Stage, progress: Progress, *, anew: bool = False, keep: Callable[[Path], None] | None = None
) -> StageResult:
    """The result of a stage: the stored one where there is one and it is whole (unless `anew`), else made here."""
    found = None if anew else find(store, stage, progress)
    return execute(store, stage, progress, keep=keep) if found is None else found


def find(store: Store, stage: Stage, progress: Progress) -> StageResult | None:
    """The stored result, every byte of it checked; a damaged one is told and taken for none."""
    start = time.monotonic()
    try:
        manifest = store.find(stage.action.key)
    except CorruptError as error:
        progress(f"the stored result is damaged and will be made again: {error.message}")
        return None
    if manifest is None:
        return None
    if stage.resumable:
        with suppress(LlmoptError):  # what is left of a run that was killed between publishing and this
            store.forget(stage.action.key)
    if store.signer is not None:  # nobody vouches for what others made without saying so
        envelopes = store.envelopes(manifest.id)
        if signing.trusted(manifest, envelopes, [store.signer.public]) is None:
            progress(f"found in the store and not signed by your key: `llmopt store sign {manifest.id[:19]}` signs it")
    return _result(store, stage, manifest, progress, cached=True, start=start)


def execute(
    store: Store, stage: Stage, progress: Progress, *, keep: Callable[[Path], None] | None = None
) -> StageResult:
    """Check, work in a staging folder, publish. Whatever ends it early, nothing half-made can be found.

    A resumable stage finds in its folder what it left when it was ended.

    `keep` is called with the staging folder of a measurement that ended early, since that cannot be had again.
    The store's signer, if it has one, signs how the result was made before anyone can find it.
    """
    start, started = time.monotonic(), time.time()
    stage.check()
    with store.stage(stage.action.key if stage.resumable else None) as out:
        try:
            outcome = stage.produce(out, progress)
        except BaseException:
            if keep is not None and not stage.repeatable:
                keep(out)
            raise

        def attestation(manifest: Manifest) -> dict[str, Json]:
            made = attest(manifest, started=started, finished=time.time(), byproducts=outcome.byproducts)
            return made if store.signer is None else signing.sign(made, store.signer)

        manifest = store.put(
            out,
            kind=stage.kind,
            action=stage.action,
            status=outcome.status,
            events=outcome.events,
            metrics=outcome.metrics,
            attestation=attestation,
        )
    return _result(store, stage, manifest, progress, cached=False, start=start)


def _result(
    store: Store, stage: Stage, manifest: Manifest, progress: Progress, *, cached: bool, start: float
) -> StageResult:
    path = store.path(manifest.id)
    results = store.results(stage.action.key) if stage.repeatable else []
    if len(results) > 1:
        listed = ", ".join(result[:19] for result in results)
        progress(f"not reproducible: the same action has given {len(results)} different results: {listed}")
    return StageResult(
        artifact=manifest.id,
        action=stage.action.key,
        cached=cached,
        kind=manifest.kind,
        status=manifest.status,
        path=str(path),
        bytes=manifest.size,
        seconds=round(time.monotonic() - start, 3),
        metrics=manifest.metrics,
        events=manifest.events,
        license=licenses.join(stated.license for stated in licenses.of_manifest(manifest)),
        reproducible=len(results) < 2,
    )
