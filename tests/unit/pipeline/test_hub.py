"""Models, adapters and data sets of a hub: a server in this process speaks its protocol to huggingface_hub."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.store import Store
from llmopt.errors import CorruptError, Exit, LlmoptError, SettingsError
from llmopt.pipeline import inputs, stages
from llmopt.pipeline.hub import Reference

TINY = "someone/tiny"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def published(hub: Any, tiny: Path) -> str:
    """The tiny model beside what no stage reads; its commit."""
    more = {"README.md": b"about", "pytorch_model.bin": b"pickle", "onnx/model.json": b"{}", "LICENSE": b"free"}
    return str(hub.add(TINY, files_of(tiny) | more | {"consolidated.safetensors": b"again"}))


def refused(store: Store, reference: str = TINY) -> LlmoptError:
    with pytest.raises(LlmoptError) as caught:
        inputs.model(store, reference)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Reference(kind="model", name="org/name")),
        ("org/na.me-2@v1.0", Reference(kind="model", name="org/na.me-2", revision="v1.0")),
        ("org/name@refs/pr/3", Reference(kind="model", name="org/name", revision="refs/pr/3")),
        ("datasets:org/name", Reference(kind="dataset", name="org/name")),
        ("datasets:org/name:test", Reference(kind="dataset", name="org/name", part="test")),
        (
            "datasets:org/name@refs/convert/parquet:en/train",
            Reference(kind="dataset", name="org/name", revision="refs/convert/parquet", part="en/train"),
        ),
        ("name", None),
        ("a/b/c", None),
        ("org/name@", None),
        ("org/name@../../x", None),
        ("org/name@/x", None),
    ],
)
def test_references(text: str, expected: Reference | None) -> None:
    assert Reference.parse(text) == expected
    assert expected is None or str(expected) == text


def test_only_what_stages_read_is_fetched(hub: Any, published: str, store: Store, tiny: Path) -> None:
    found = inputs.model(store, TINY)
    assert sorted(hub.downloads()) == sorted([*files_of(tiny), "LICENSE", "README.md"])
    assert "README.md" not in {file.name for file in found.files}
    assert found.source == f"hf:{TINY}@{published}"


def test_a_model_has_one_digest_wherever_it_comes_from(
    hub: Any, published: str, store: Store, tiny: Path, tmp_path: Path
) -> None:
    local = Path(shutil.copytree(tiny, tmp_path / "local"))
    (local / "LICENSE").write_bytes(b"free")
    assert inputs.model(store, TINY).id == inputs.resolve(store, str(local)).id


def test_a_second_time_nothing_is_fetched(hub: Any, published: str, store: Store) -> None:
    first = inputs.model(store, TINY)
    hub.requests.clear()
    assert inputs.model(store, TINY) == first
    assert hub.downloads() == []


def test_a_revision_is_pinned_to_its_commit(hub: Any, published: str, store: Store, tiny: Path) -> None:
    newer = hub.add(TINY, files_of(tiny) | {"generation_config.json": b'{"seed": 1}'})
    old, new = inputs.model(store, f"{TINY}@{published}"), inputs.model(store, TINY)
    assert (old.source, new.source) == (f"hf:{TINY}@{published}", f"hf:{TINY}@{newer}")
    assert old.id != new.id


def test_the_shards_that_the_index_names_are_fetched(
    hub: Any, store: Store, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint("llama", shards=3)
    hub.add(TINY, files_of(folder) | {"model.fp16.safetensors": b"a variant"})
    found = inputs.model(store, TINY)
    assert sorted(path.name for path in found.path.iterdir()) == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stage", ["compile", "eval", "calibrate", "quantize"])
def test_where_a_model_is_from_is_in_the_action(hub: Any, published: str, store: Store, stage: str) -> None:
    model = inputs.model(store, TINY)
    source = stages.calibration_source(store, {}, lambda line: None)
    assert source is not None
    made = {
        "compile": lambda: stages.compile_(model, {}),
        "eval": lambda: stages.evaluate(model, model, {}),
        "quantize": lambda: stages.quantize(model, {"method": "rtn"}),
        "calibrate": lambda: stages.calibrate(model, source, {}),
    }[stage]().action.inputs
    if stage == "calibrate":  # of the model it reads only the tokenizer, whoever it is from
        assert made.keys() == {"tokenizer", "data"}
        return
    assert made["model"] == model.id
    assert made["model_source"] == f"hf:{TINY}@{published}"
    assert stage != "eval" or made["base_source"] == made["model_source"]


def test_a_folder_of_that_name_wins(
    hub: Any, published: str, store: Store, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, tmp_path / TINY)
    monkeypatch.chdir(tmp_path)
    assert inputs.model(store, TINY).source is None
    assert hub.requests == []


def test_what_is_fetched_is_said_and_stderr_is_left_alone(
    hub: Any, published: str, store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    inputs.model(store, TINY, said.append)
    assert said[0].startswith(f"fetching {TINY} at {published[:7]}: ")
    assert capfd.readouterr() == ("", "")


def test_a_long_fetch_says_how_far_it_is(
    hub: Any, published: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmopt.pipeline import hub as module

    monkeypatch.setattr(module, "_SAY_EVERY_S", 0.0)
    said: list[str] = []
    inputs.model(store, TINY, said.append)
    (last,) = [line for line in said if line.startswith("fetching model.safetensors: ")][-1:]
    done, total = last.rpartition(": ")[2].split(" of ")
    assert done == total


def test_offline_uses_what_was_fetched(hub: Any, published: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    online = inputs.model(store, TINY)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert inputs.model(store, TINY) == online
    assert inputs.model(store, f"{TINY}@{published}").id == online.id
    assert hub.requests == []


def test_offline_without_a_copy_says_so(hub: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(store)
    assert "HF_HUB_OFFLINE" in error.message


def test_offline_with_a_part_of_the_copy_says_what_is_missing(
    hub: Any, published: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (inputs.model(store, TINY).path / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(store).message == f"the cached copy of `{TINY}` lacks `model.safetensors`"


def test_a_hub_that_is_down_is_made_up_for_by_the_cache_and_told(hub: Any, published: str, store: Store) -> None:
    before = inputs.model(store, TINY)
    hub.down = 503
    said: list[str] = []
    assert inputs.model(store, TINY, said.append) == before
    assert published[:7] in said[0]


def test_no_network(hub: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = refused(store)
    assert "cannot be reached" in error.message
    assert "HF_ENDPOINT" in str(error.hint)


def test_a_model_that_is_not_there(hub: Any, store: Store) -> None:
    assert "or it is private" in refused(store, "someone/tinny").message


def test_a_revision_that_is_not_there(hub: Any, published: str, store: Store) -> None:
    assert refused(store, f"{TINY}@v9").message == f"`{TINY}` has no revision `v9`"


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_gated_model(hub: Any, store: Store, tiny: Path, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    hub.add(TINY, files_of(tiny), gated=True)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    error = refused(store)
    assert "gated" in error.message
    assert "HF_TOKEN" in str(error.hint)


def test_a_token_opens_a_gated_model(hub: Any, store: Store, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(TINY, files_of(tiny), gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert inputs.model(store, TINY).kind == "model"


@pytest.mark.parametrize("status", [401, 403, 418, 429])
def test_other_refusals_are_told_with_their_number(hub: Any, store: Store, status: int) -> None:
    hub.down = status
    error = refused(store)
    assert str(status) in error.message or "private" in error.message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tiny-Q4_K_M.gguf"])
def test_a_model_without_safetensors_is_told_what_it_has(hub: Any, store: Store, name: str) -> None:
    hub.add(TINY, {"config.json": b"{}", name: b"x"})
    error = refused(store)
    assert f"only as `{name}`" in error.message
    assert hub.downloads() == []


def test_an_index_that_names_pickles_is_refused_and_none_is_fetched(hub: Any, store: Store) -> None:
    index = json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}).encode()
    hub.add(TINY, {"config.json": b"{}", "model.safetensors.index.json": index, "pytorch_model-1.bin": b"x"})
    error = refused(store)
    assert "only as `pytorch_model-1.bin`" in error.message
    assert f"{TINY} tiny`" in str(error.hint)
    assert "pytorch_model-1.bin" not in hub.downloads()


def test_an_adapter_is_not_a_model(hub: Any, store: Store) -> None:
    hub.add(TINY, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "model.safetensors": b"x"})
    assert "the model it was made for" in str(refused(store).hint)


def test_an_interrupted_file_goes_on_where_it_stopped(hub: Any, published: str, store: Store, tiny: Path) -> None:
    hub.cut["model.safetensors"] = 1
    found = inputs.model(store, TINY)
    assert (found.path / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_a_file_of_another_size_is_an_error(hub: Any, published: str, store: Store) -> None:
    hub.grown.add("model.safetensors")
    error = refused(store)
    assert error.message == f"`model.safetensors` of `{TINY}` came truncated"
    hub.grown.clear()
    assert inputs.model(store, TINY).kind == "model"


def test_a_damaged_cache_is_found(hub: Any, published: str, store: Store) -> None:
    blob = (inputs.model(store, TINY).path / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CorruptError, match="is damaged in the cache"):
        inputs.model(store, TINY)


def test_too_little_space_is_told_before_the_fetch(
    hub: Any, published: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    error = refused(store)
    assert "1 B free" in error.message
    assert "HF_HOME" in str(error.hint)
    assert hub.downloads() == []


def test_a_disk_that_fills_up_is_told(hub: Any, published: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    error = refused(store)
    assert "too little space" in error.message
    assert "HF_HOME" in str(error.hint)


def test_an_adapter_of_the_hub_is_its_two_files(hub: Any) -> None:
    commit = hub.add(
        "someone/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "tokenizer.json": b"{}"}
    )
    found = inputs.adapter("someone/lora")
    assert sorted(hub.downloads()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert found.source == f"hf:someone/lora@{commit}"


ROWS = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5)).encode()


def dataset(store: Store, reference: str) -> inputs.Input:
    return inputs.calibration(store, f"datasets:someone/{reference}")


def test_a_data_set_is_the_files_of_its_split(hub: Any, store: Store) -> None:
    commit = hub.add("datasets/someone/texts", {"train.jsonl": ROWS, "test.jsonl": b"{}", "README.md": b"x"})
    found = dataset(store, "texts")
    assert found.kind == "rows"
    assert [path.name for path in found.files] == ["train.jsonl"]
    assert found.source == f"hf:datasets/someone/texts@{commit}"
    assert [path.name for path in dataset(store, "texts:test").files] == ["test.jsonl"]


def test_one_configuration_of_a_data_set_is_asked_for(hub: Any, store: Store) -> None:
    names = ("en/train-00000-of-00001.parquet", "en/test-00000-of-00001.parquet", "de/train-00000-of-00001.parquet")
    hub.add("datasets/someone/texts", dict.fromkeys(names, b"p"))
    with pytest.raises(SettingsError) as caught:
        dataset(store, "texts")
    assert "`de`, `en`" in str(caught.value.hint)
    assert [path.parent.name for path in dataset(store, "texts@refs/convert/parquet:de/train").files] == ["de"]


def test_of_a_large_data_set_the_first_files_are_enough(
    hub: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmopt.pipeline import hub as module

    monkeypatch.setattr(module, "_ENOUGH_BYTES", len(ROWS) + 1)
    hub.add("datasets/someone/texts", {f"data/train-{i:05}.jsonl": ROWS for i in range(5)})
    assert [path.name for path in dataset(store, "texts").files] == ["train-00000.jsonl", "train-00001.jsonl"]


def test_a_data_set_of_nothing_that_is_read_names_where_there_may_be_parquet(hub: Any, store: Store) -> None:
    hub.add("datasets/someone/texts", {"texts.py": b"script"})
    with pytest.raises(LlmoptError, match="no parquet and no JSON lines") as caught:
        dataset(store, "texts")
    assert "@refs/convert/parquet" in str(caught.value.hint)


def test_the_command_reads_the_hubs_own_environment(hub: Any, published: str, tmp_path: Path) -> None:
    """A process of its own: HF_ENDPOINT and HF_HOME count, and huggingface_hub is not loaded without need."""
    code = (
        "import sys\n"
        "from llmopt.cli.app import main\n"
        "code = main(sys.argv[1:])\n"
        "print('hub:', 'huggingface_hub' in sys.modules)\n"
        "sys.exit(code)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "LLMOPT_"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "LLMOPT_STORE": str(tmp_path / "store")}

    def llmopt(*arguments: str) -> tuple[int, dict[str, Any], bool, str]:
        ran = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        lines = ran.stdout.splitlines()
        return ran.returncode, json.loads(lines[0]), lines[-1] == "hub: True", ran.stderr

    small = ("--method", "rtn", "--group-size", "32")
    status, made, loaded, said = llmopt("quantize", TINY, *small)
    assert (status, loaded) == (Exit.OK, True)
    assert (tmp_path / "home" / "hub").is_dir()
    assert all(line.startswith(("fetching", "block")) for line in said.splitlines()), said
    shown = llmopt("store", "show", made["artifact"])
    assert shown[1]["manifest"]["action"]["inputs"]["model_source"] == f"hf:{TINY}@{published}"
    assert not shown[2]
    environment["HF_HUB_OFFLINE"] = "1"
    hub.requests.clear()
    status, again, _, _ = llmopt("quantize", TINY, *small)
    assert (status, again["cached"], again["artifact"]) == (Exit.OK, True, made["artifact"])
    assert hub.requests == []


def test_of_two_bars_for_one_file_the_one_that_is_further_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As downloads in chunks have: one bar for what is written, one for what came over the wire."""
    from llmopt.pipeline import hub as module

    monkeypatch.setattr(module, "_SAY_EVERY_S", 0.0)
    said: list[str] = []
    progress = module._Said(said.append, 2000)
    one, other = (progress.bar("model.safetensors")(total=1000, unit="B") for _ in range(2))
    one.update(600)
    other.update(300)
    progress.bar("second.safetensors")(total=1000, initial=0).update(400)
    assert said[-2:] == [
        "fetching model.safetensors: 600 B of 2.0 KiB", "fetching second.safetensors: 1000 B of 2.0 KiB"
    ]  # fmt: skip
