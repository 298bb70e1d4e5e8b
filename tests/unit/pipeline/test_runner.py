from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from llmopt.artifacts import disk
from llmopt.artifacts.outcome import silent
from llmopt.artifacts.store import Store
from llmopt.artifacts.trust import signing
from llmopt.artifacts.trust.keys import SigningKey
from llmopt.errors import LlmoptError, SettingsError
from llmopt.pipeline import runner
from llmopt.pipeline.runner import Stage

MakeStage = Callable[..., Stage]


def the_blob(store: Store) -> Path:
    (blob,) = (path for path in (store.root / "blobs").rglob("*") if path.is_file())
    return blob


def damage(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))


def everything(store: Store) -> list[str]:
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file())


def test_the_second_run_is_a_hit_and_does_no_work(store: Store, make_stage: MakeStage) -> None:
    done: list[str] = []
    first = runner.run(store, make_stage(done=done), silent)
    second = runner.run(store, make_stage(done=done), silent)
    assert (first.cached, second.cached) == (False, True)
    assert done == ["weights"]
    assert first.artifact == second.artifact


def test_a_result_says_what_json_promises(store: Store, make_stage: MakeStage) -> None:
    result = runner.run(store, make_stage(), silent)
    value = json.loads(json.dumps(result.to_json()))
    assert value.keys() >= {
        "artifact", "action", "cached", "kind", "status", "path", "bytes", "seconds", "metrics"
    }  # fmt: skip
    assert value["bytes"] == len("weights")
    assert value["metrics"] == {"figure": 1.5}
    assert value["events"] == ["rounded to nearest"]
    assert (Path(value["path"]) / "model.safetensors").read_text() == "weights"


def test_the_check_comes_before_the_work(store: Store, make_stage: MakeStage) -> None:
    done: list[str] = []
    with pytest.raises(SettingsError):
        runner.run(store, make_stage(done=done, refuse=SettingsError("no")), silent)
    assert done == []


def test_a_hit_needs_no_check(store: Store, make_stage: MakeStage) -> None:
    runner.run(store, make_stage(), silent)
    assert runner.run(store, make_stage(refuse=SettingsError("no")), silent).cached


def test_a_hit_removes_what_a_run_that_was_killed_after_publishing_has_left(
    store: Store, make_stage: MakeStage
) -> None:
    stage = make_stage(resumable=True)
    runner.run(store, stage, silent)
    before = everything(store)
    with pytest.raises(ZeroDivisionError), store.stage(stage.action.key):
        raise ZeroDivisionError
    assert everything(store) != before
    assert runner.run(store, stage, silent).cached
    assert everything(store) == before


def test_anew_measures_again_and_the_newest_is_found(store: Store, make_stage: MakeStage) -> None:
    runner.run(store, make_stage("first", repeatable=False), silent)
    second = runner.run(store, make_stage("second", repeatable=False), silent, anew=True)
    found = runner.run(store, make_stage("third", repeatable=False), silent)
    assert found.cached
    assert found.artifact == second.artifact
    assert found.reproducible


def test_a_second_result_of_the_same_action_is_told(store: Store, make_stage: MakeStage) -> None:
    said: list[str] = []
    first = runner.run(store, make_stage("first"), lambda line, /, **facts: said.append(line))
    assert first.reproducible
    second = runner.run(store, make_stage("second"), lambda line, /, **facts: said.append(line), anew=True)
    assert not second.reproducible
    assert any(line.startswith("not reproducible") for line in said)
    assert first.artifact[:19] in said[-1]
    assert second.artifact[:19] in said[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LlmoptError("no"), ZeroDivisionError()])
def test_what_ends_early_leaves_nothing_behind(store: Store, make_stage: MakeStage, error: BaseException) -> None:
    with pytest.raises(type(error)):
        runner.run(store, make_stage(fail=error), silent)
    assert everything(store) == []
    assert not runner.run(store, make_stage(), silent).cached


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LlmoptError("no"), ZeroDivisionError()])
def test_what_a_measurement_had_written_can_be_kept(store: Store, make_stage: MakeStage, error: BaseException) -> None:
    seen: list[str] = []
    with pytest.raises(type(error)):
        runner.run(
            store,
            make_stage("figures", repeatable=False, fail=error),
            silent,
            keep=lambda staged: seen.append((staged / "model.safetensors").read_text()),
        )
    assert seen == ["figures"]
    assert everything(store) == []


def test_what_can_be_made_again_is_not_kept(store: Store, make_stage: MakeStage) -> None:
    with pytest.raises(LlmoptError):
        runner.run(store, make_stage(fail=LlmoptError("no")), silent, keep=lambda _: pytest.fail("kept"))
    runner.run(store, make_stage(repeatable=False), silent, keep=lambda _: pytest.fail("kept"))


def test_a_failed_stage_is_not_remembered_as_done(store: Store, make_stage: MakeStage) -> None:
    with pytest.raises(LlmoptError):
        runner.run(store, make_stage(fail=LlmoptError("no")), silent)
    assert runner.find(store, make_stage(), silent) is None


def test_a_flipped_byte_is_told_and_healed_and_never_delivered(store: Store, make_stage: MakeStage) -> None:
    artifact = runner.run(store, make_stage(), silent).artifact
    damage(the_blob(store))
    said: list[str] = []
    fresh = Store(store.root)  # as the next process sees it
    healed = runner.run(fresh, make_stage(), lambda line, /, **facts: said.append(line))
    assert not healed.cached
    assert healed.artifact == artifact
    assert "damaged" in said[0]
    assert (Path(healed.path) / "model.safetensors").read_text() == "weights"
    assert runner.run(Store(store.root), make_stage(), silent).cached


def test_a_damaged_manifest_is_healed_too(store: Store, make_stage: MakeStage) -> None:
    artifact = runner.run(store, make_stage(), silent).artifact
    (manifest,) = (store.root / "manifests").rglob("*.json")
    damage(manifest)
    assert runner.run(Store(store.root), make_stage(), silent).artifact == artifact
    assert Store(store.root).verify(artifact) == []


def test_a_missing_blob_is_healed(store: Store, make_stage: MakeStage) -> None:
    runner.run(store, make_stage(), silent)
    the_blob(store).unlink()
    assert not runner.run(Store(store.root), make_stage(), silent).cached
    assert runner.run(Store(store.root), make_stage(), silent).cached


def test_a_full_disk_is_an_error_that_names_the_store(store: Store, make_stage: MakeStage) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(LlmoptError) as caught:
        runner.run(store, make_stage(fail=full), silent)
    assert f"the disk of the store `{store.root}`" in caught.value.message
    assert "--store" in str(caught.value.hint)


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "quantize.awq"},
        {"op_version": 2},
        {"inputs": {"model": "sha256:" + "b" * 64}},
        {"settings": {"bits": 3, "seed": 0}},
        {"settings": {"bits": 4, "seed": 1}},
        {"code": "sha256:" + "d" * 64},
        {"deps": {"torch": "2.14.0"}},
        {"target": {"arch": "aarch64"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_decides_the_result_gives_another_key(
    store: Store, make_stage: MakeStage, changes: dict[str, object]
) -> None:
    runner.run(store, make_stage(), silent)
    assert not runner.run(store, make_stage(**changes), silent).cached


def test_the_statement_about_a_run_names_its_times_and_its_action(store: Store, make_stage: MakeStage) -> None:
    result = runner.run(store, make_stage(), silent)
    (statement,) = store.attestations(result.artifact)
    text = json.dumps(statement)
    assert result.action in text
    assert "startedOn" in text


def test_a_store_that_signs_publishes_only_what_is_signed(
    store: Store, make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ends it, and when: what can be found has its signature."""
    key = SigningKey(Ed25519PrivateKey.generate())
    store.signer = key
    publish = disk.publish

    def watched(data: bytes, target: Path, **where: Path) -> None:
        publish(data, target, **where)
        for path in (store.root / "actions").rglob("*.json"):
            artifact = f"sha256:{path.stem}"
            signing.require(store.get(artifact), store.envelopes(artifact), [key.public])

    monkeypatch.setattr(disk, "publish", watched)
    result = runner.run(store, make_stage(), silent)
    assert len(store.attestations(result.artifact)) == len(store.envelopes(result.artifact)) == 1
    assert store.results(result.action) == [result.artifact]
