"""Conversions keep every dequantized weight to the bit, or are refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from llmopt import quantizers
from llmopt.artifacts.outcome import silent
from llmopt.errors import LlmoptError, SettingsError
from llmopt.formats.convert import check_convert, convert
from llmopt.formats.reading import open_model
from llmopt.formats.scheme import Scheme

W4 = Scheme(bits=4, group_size=32, symmetric=True)
W4_ASYMMETRIC = replace(W4, symmetric=False)
FP8 = Scheme(bits=8, group_size=0, symmetric=True, activations="static", kind="float")
FP8_ROWS = replace(FP8, group_size=-1, activations="dynamic")
INT8 = Scheme(bits=8, group_size=-1, symmetric=True)
W8A8 = replace(INT8, activations="static")


def converted(model: Path, name: str, out: Path) -> Path:
    check_convert(model, name)
    out.mkdir()
    convert(model, name, out, silent)
    return out


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def plain_but_head(scheme: Scheme) -> Callable[[str], Scheme | None]:
    return lambda prefix: None if prefix == "lm_head" else scheme


@pytest.mark.parametrize(
    ("scheme", "formats"),
    [
        (W4, ("compressed-tensors", "gptq", "awq", "modelopt")),
        (W4_ASYMMETRIC, ("gptq", "awq", "compressed-tensors")),
        (replace(W4_ASYMMETRIC, bits=3, group_size=-1), ("gptq", "compressed-tensors")),
        (replace(W4, bits=8), ("compressed-tensors", "gptq")),
        (INT8, ("modelopt", "gptq", "compressed-tensors")),
        (W8A8, ("compressed-tensors", "modelopt")),
        (FP8, ("compressed-tensors", "modelopt")),
        (FP8_ROWS, ("modelopt", "compressed-tensors")),
    ],
    ids=str,
)
def test_there_and_back_again(
    make_checkpoint: Any, encoded: Any, dequantized: Any, tmp_path: Path, scheme: Scheme, formats: tuple[str, ...]
) -> None:
    """Round the circle of formats: the weights at each step, and the very files in the end."""
    first, *others = formats
    start = encoded(make_checkpoint("llama"), first, plain_but_head(scheme))
    before, folder = dequantized(start), start
    for name in (*others, first):
        folder = converted(folder, name, tmp_path / f"{len(list(tmp_path.iterdir()))}")
        assert same(dequantized(folder), before)
        source = open_model(folder)
        assert source.reader is not None
        prefix = "model.layers.1.mlp.down_proj"
        assert source.reader.activations(prefix) == scheme.activations
        assert source.reader.input_scale(prefix) == (0.0625 if scheme.activations == "static" else None)
    end = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    begin = load_file(start / "model.safetensors")
    assert end.keys() == begin.keys()
    assert all(end[name].dtype == begin[name].dtype for name in begin)
    assert all((end[name].float() == begin[name].float()).all() for name in begin)
    for file in ("config.json", "tokenizer.json", *(("hf_quant_config.json",) if first == "modelopt" else ())):
        assert json.loads((folder / file).read_text()) == json.loads((start / file).read_text())


def test_mixtures_and_the_kv_cache_go_along(
    make_checkpoint: Any, encoded: Any, dequantized: Any, tmp_path: Path
) -> None:
    kinds = {"down_proj": FP8, "o_proj": None, "up_proj": INT8, "lm_head": INT8}
    start = encoded(
        make_checkpoint("qwen2"), "compressed-tensors", lambda p: kinds.get(p.rsplit(".", 1)[-1], W4), kv_cache="fp8"
    )
    there = converted(start, "modelopt", tmp_path / "there")
    said = json.loads((there / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "MIXED_PRECISION"
    assert said["kv_cache_quant_algo"] == "FP8"
    back = converted(there, "compressed-tensors", tmp_path / "back")
    assert same(dequantized(there), dequantized(start))
    assert same(dequantized(back), dequantized(start))
    readers = [open_model(folder).reader for folder in (start, there, back)]
    assert all(reader is not None and reader.kv_scales() == readers[0].kv_scales() for reader in readers)  # type: ignore[union-attr]
    assert json.loads((back / "config.json").read_text()) == json.loads((start / "config.json").read_text())


def test_zero_points_in_name_only_are_left_out(
    make_checkpoint: Any, encoded: Any, dequantized: Any, tmp_path: Path
) -> None:
    """AWQ always has zero points; symmetric weights in it go to a format that has none."""
    start = encoded(make_checkpoint("llama"), "awq", plain_but_head(W4))
    assert same(dequantized(converted(start, "modelopt", tmp_path / "out")), dequantized(start))


def test_scales_that_would_change_are_counted(make_checkpoint: Any, encoded: Any) -> None:
    start = encoded(make_checkpoint("llama"), "modelopt", plain_but_head(W4))
    tensors = load_file(start / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"][:3, 0] *= 1.001
    tensors["model.layers.1.mlp.up_proj.weight_scale"][5, 1] = 1e9
    save_file(tensors, start / "model.safetensors")
    with pytest.raises(LlmoptError, match=r"4 of \d+ scales would change: `gptq` has them in F16"):
        check_convert(start, "gptq")
    check_convert(start, "modelopt")


@pytest.mark.parametrize(
    ("scheme", "name", "message"),
    [
        (W4_ASYMMETRIC, "modelopt", "cannot hold zero points"),
        (replace(W4, bits=3), "awq", "cannot hold 3-bit weights"),
        (FP8, "gptq", "cannot hold FP8 weights"),
        (W8A8, "gptq", "cannot hold quantized activations"),
    ],
    ids=str,
)
def test_what_the_other_format_cannot_hold_is_refused(
    make_checkpoint: Any, encoded: Any, scheme: Scheme, name: str, message: str
) -> None:
    start = encoded(make_checkpoint("llama"), "compressed-tensors", plain_but_head(scheme))
    with pytest.raises(SettingsError, match=message):
        check_convert(start, name)


def test_scattered_columns_and_changed_inputs_are_refused(make_checkpoint: Any, encoded: Any) -> None:
    start = encoded(make_checkpoint("llama"), "gptq", plain_but_head(W4))
    tensors = load_file(start / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"] = tensors["model.layers.1.mlp.up_proj.g_idx"].flip(0).contiguous()
    save_file(tensors, start / "model.safetensors")
    with pytest.raises(LlmoptError, match=r"`model.layers.1.mlp.up_proj` has groups of scattered columns"):
        check_convert(start, "compressed-tensors")
    start = encoded(make_checkpoint("llama"), "modelopt", plain_but_head(W4))
    tensors = load_file(start / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.pre_quant_scale"][7] = 2
    save_file(tensors, start / "model.safetensors")
    with pytest.raises(LlmoptError, match=r"`model.layers.1.mlp.up_proj` has a `pre_quant_scale`"):
        check_convert(start, "gptq")


def test_a_plain_checkpoint_has_nothing_to_convert(tiny: Path) -> None:
    with pytest.raises(LlmoptError, match="is not quantized"):
        check_convert(tiny, "gptq")


def test_convert_is_a_method_without_settings_of_its_own(
    make_checkpoint: Any, encoded: Any, dequantized: Any, tmp_path: Path
) -> None:
    settings = quantizers.resolve({"method": "convert", "format": "gptq"})
    assert not settings.needs_calibration
    assert settings.to_json() == {"method": "convert", "format": "gptq"}
    start = encoded(make_checkpoint("llama"), "compressed-tensors", plain_but_head(W4))
    quantizers.check(start, settings, None)
    (tmp_path / "out").mkdir()
    outcome = quantizers.quantize(start, settings, None, tmp_path / "out", silent)
    assert outcome.metrics["linears"] == 14
    assert same(dequantized(tmp_path / "out"), dequantized(start))


@pytest.mark.parametrize("settings", [{"bits": 4}, {"samples": 8}, {"format": "awk"}])
def test_convert_takes_a_format_only(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        quantizers.resolve({"method": "convert"} | settings)
