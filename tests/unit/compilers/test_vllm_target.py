"""The target `vllm` carries a checkpoint over as it is, checked, or says why vLLM would not load it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmopt import compilers
from llmopt.artifacts.outcome import silent
from llmopt.compilers.inspection import CHECKSUMS
from llmopt.compilers.model_check import check_model
from llmopt.compilers.trt_llm.validate import validate
from llmopt.compilers.vllm_target import VLLM
from llmopt.errors import CorruptError, LlmoptError, SettingsError
from llmopt.formats.scheme import Scheme

W4 = Scheme(bits=4, group_size=32, symmetric=True)
W8A8 = Scheme(bits=8, group_size=-1, symmetric=True, activations="dynamic")
FP8 = Scheme(bits=8, group_size=0, symmetric=True, activations="static", kind="float")


def prepared(model: Path, out: Path, **settings: Any) -> Path:
    out.mkdir()
    target = compilers.resolve({"target": "vllm", **settings})
    assert isinstance(target, VLLM)
    target.check(model)
    assert target.compile(model, out, silent).status == "prepared"
    return out


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        (None, ""),
        (W4, "compressed-tensors"),
        (replace(W4, symmetric=False), "compressed-tensors"),
        (W4, "gptq"),
        (replace(W4, symmetric=False), "awq"),
        (W8A8, "compressed-tensors"),
        (replace(W8A8, activations="static"), "compressed-tensors"),
        (FP8, "compressed-tensors"),
        (FP8, "modelopt"),
    ],
    ids=str,
)
def test_the_weights_are_the_same_bytes(
    make_checkpoint: Any, quantize: Any, tmp_path: Path, scheme: Scheme | None, format: str
) -> None:
    model = make_checkpoint("llama")
    model = model if scheme is None else quantize(model, scheme, format)
    out = prepared(model, tmp_path / "out", tensor_parallel=1)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / "model" / name).read_bytes() == (model / name).read_bytes()
    about = json.loads((out / "engine.json").read_text())
    assert about["quant_algo"] == (format or None)
    assert (out / "model" / CHECKSUMS).is_file()


def test_the_launch_files_say_what_the_settings_say(make_checkpoint: Any, tmp_path: Path) -> None:
    out = prepared(
        make_checkpoint("llama"),
        tmp_path / "out",
        tensor_parallel=2,
        max_seq_len=128,
        kv_cache="fp8",
        served_name="tiny",
        serve={"seed": 7},
    )
    said = yaml.safe_load((out / "deploy" / "vllm" / "serve.yaml").read_text())
    expected = {"tensor-parallel-size": 2, "max-model-len": 128, "kv-cache-dtype": "fp8", "served-model-name": "tiny"}
    assert expected.items() <= said.items()
    assert said["seed"] == 7
    script = out / "deploy" / "vllm" / "serve.sh"
    assert script.stat().st_mode & 0o111
    assert '$here/../../model"' in script.read_text()


@pytest.mark.parametrize(
    ("scheme", "format", "message"),
    [
        (W4, "modelopt", "`modelopt` with 4-bit weights"),
        (replace(W4, bits=3), "gptq", "`gptq` with 3-bit weights"),
        (replace(W4, bits=5), "compressed-tensors", "`compressed-tensors` with 5-bit weights"),
        (replace(W4, symmetric=False), "gptq", "one scale a group and zero points"),
        (replace(W4, group_size=16), "compressed-tensors", "no kernel for groups of 16"),
    ],
    ids=str,
)
def test_what_vllm_does_not_load_is_refused(
    make_checkpoint: Any, quantize: Any, tmp_path: Path, scheme: Scheme, format: str, message: str
) -> None:
    plain = make_checkpoint("llama", hidden_size=128, intermediate_size=128)
    model = quantize(plain, scheme if format != "modelopt" else replace(scheme, group_size=128), format)
    with pytest.raises(LlmoptError, match=message):
        VLLM().check(model)


def test_a_value_that_is_no_number_is_found_before_anything_is_delivered(make_checkpoint: Any, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(make_checkpoint("llama"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CorruptError, match=r"`model.layers.0.mlp.up_proj.weight` has 1 of \d+ values that are not fin"):
        prepared(model, tmp_path / "out")


def test_what_changed_afterwards_is_found(make_checkpoint: Any, quantize: Any, tmp_path: Path) -> None:
    """ModelOpt's without hf_quant_config.json, which vLLM can do without."""
    out = prepared(quantize(make_checkpoint("llama"), FP8, "modelopt"), tmp_path / "out")
    folder, report = out / "model", validate(out)
    assert report.what == "checkpoint for vLLM"
    assert report.digests == check_model(folder, "checkpoint").digests > 0
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(CorruptError, match=r"config\.json: has changed"):
        check_model(folder, "checkpoint")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 0}, "`compile.tensor_parallel` cannot be `0`"),
        ({"aot": False}, "`compile.aot` cannot be false"),
        ({"gpu": "H1000"}, "unknown hardware `H1000`"),
        ({"emit": ["k9s"]}, "`compile.emit` cannot be `k9s`"),
        ({"build": {}}, "has no setting `build`"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        compilers.resolve({"target": "vllm", **settings})
    assert message in caught.value.message


def test_sizes_that_do_not_fit_the_model_are_refused(make_checkpoint: Any) -> None:
    model = make_checkpoint("llama")
    with pytest.raises(LlmoptError, match="4 attention heads cannot be split over 3"):
        VLLM(tensor_parallel=3).check(model)
    with pytest.raises(LlmoptError, match="over the 256 positions"):
        VLLM(max_seq_len=512).check(model)
