"""Keys: whatever may change the bytes of a result is in them, and nothing else is."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import silent
from llmopt.artifacts.store import Store
from llmopt.errors import BackendMissingError, SettingsError
from llmopt.pipeline import inputs, stages


def quantize_key(model: Path, **settings: Any) -> str:
    return stages.quantize(inputs.resolve(Store(model), str(model)), settings).action.key


def calibrate_key(model: Path, **settings: Any) -> str:
    store = Store(model)
    source = stages.calibration_source(store, settings, silent)
    assert source is not None
    return stages.calibrate(inputs.resolve(store, str(model)), source, settings).action.key


def compile_key(model: Path, **settings: Any) -> str:
    return stages.compile_(inputs.resolve(Store(model), str(model)), settings).action.key


def eval_key(model: Path, **settings: Any) -> str:
    return stages.evaluate(inputs.resolve(Store(model), str(model)), None, settings).action.key


KEYS = [quantize_key, compile_key, eval_key]


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("key", KEYS)
def test_the_folder_and_its_name_are_not_in_the_key(tiny: Path, copy: Path, key: Callable[..., str]) -> None:
    assert key(copy) == key(tiny)


@pytest.mark.parametrize("key", KEYS)
def test_a_byte_of_the_model_is_in_the_key(tiny: Path, copy: Path, key: Callable[..., str]) -> None:
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert key(copy) != key(tiny)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        (quantize_key, {"seed": 1}),
        (calibrate_key, {"seed": 1}),
        (calibrate_key, {"samples": 8}),
        (calibrate_key, {"seq_len": 64}),
        (quantize_key, {"bits": 3}),
        (quantize_key, {"method": "awq"}),
        (quantize_key, {"act_order": False}),
        (quantize_key, {"format": "gptq"}),
        (compile_key, {"precision": "f32"}),
        (compile_key, {"aot": False}),
        (eval_key, {"windows": 3}),
    ],
)
def test_a_setting_is_in_the_key(tiny: Path, key: Callable[..., str], settings: dict[str, Any]) -> None:
    assert key(tiny, **settings) != key(tiny)


@pytest.mark.parametrize(
    ("key", "settings"), [(quantize_key, {"bits": 4, "method": "gptq"}), (eval_key, {"windows": 64})]
)
def test_a_default_written_out_is_the_same_key(tiny: Path, key: Callable[..., str], settings: dict[str, Any]) -> None:
    assert key(tiny, **settings) == key(tiny)


@pytest.mark.parametrize(("key", "setting"), [(calibrate_key, "calib"), (eval_key, "text")])
def test_the_text_is_in_the_key_and_its_name_is_not(
    tiny: Path, tmp_path: Path, key: Callable[..., str], setting: str
) -> None:
    texts = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for text, content in zip(texts, ("same", "same", "other"), strict=True):
        text.write_text(content)
    same, again, other = (key(tiny, **{setting: str(text)}) for text in texts)
    assert same == again
    assert other != same


def test_text_that_a_method_does_not_read_is_not_in_its_key(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("text")
    assert quantize_key(tiny, method="rtn", calib=str(tmp_path / "own.txt")) == quantize_key(tiny, method="rtn")


@pytest.mark.parametrize(("key", "package"), [(quantize_key, "torch"), (compile_key, "openvino"), (eval_key, "torch")])
def test_the_version_of_what_computes_is_in_the_key(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, key: Callable[..., str], package: str
) -> None:
    before = key(tiny)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == package else version(name))
    assert key(tiny) != before


def test_a_backend_that_is_not_installed_is_told_before_any_work(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(BackendMissingError, match="is not installed"):
        compile_key(tiny)


def test_a_measurement_is_keyed_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.pipeline import machine

    before = stages.bench({"candidate": "http://127.0.0.1:1"}, {}).action
    monkeypatch.setattr(machine, "cpu_model", lambda: "another CPU")
    after = stages.bench({"candidate": "http://127.0.0.1:1"}, {}).action
    assert before.inputs == {"candidate": "http://127.0.0.1:1"}
    assert before.key != after.key


def test_what_is_only_converted_takes_no_adapter() -> None:
    with pytest.raises(SettingsError, match="adapter cannot be merged"):
        stages.adapter({"method": "convert", "adapter": "someone/lora"}, silent)


def test_an_engine_cannot_be_quantized(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("{}")
    engine = inputs.resolve(Store(tmp_path), str(tmp_path))
    with pytest.raises(SettingsError, match="takes a checkpoint"):
        stages.quantize(engine, {})


def test_a_conversion_is_an_action_of_its_own_without_calibration(tiny: Path) -> None:
    model = inputs.resolve(Store(tiny), str(tiny))
    action = stages.quantize(model, {"method": "convert", "format": "gptq"}).action
    assert action.op == "quantize.convert"
    assert set(action.inputs) == {"model"}
    assert action.settings == {"method": "convert", "format": "gptq"}
