"""The engine folder: its files, their digests, its tokenizer, and what is refused before any work."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmopt import compilers
from llmopt.artifacts.outcome import silent
from llmopt.backends import load
from llmopt.errors import BackendMissingError, Exit, LlmoptError
from llmopt.formats.scheme import Scheme

W4 = Scheme(bits=4, group_size=32, symmetric=True)
FILES = [
    "chat_template.jinja",
    "config.json",
    "engine.json",
    "generation_config.json",
    "openvino_detokenizer.bin",
    "openvino_detokenizer.xml",
    "openvino_model.bin",
    "openvino_model.xml",
    "openvino_tokenizer.bin",
    "openvino_tokenizer.xml",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def quantized(make_checkpoint: Any, quantize: Any) -> Path:
    folder: Path = quantize(make_checkpoint("llama", tie_word_embeddings=True), W4)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_engine_holds_what_a_server_needs(quantized: Path, compiled: Any) -> None:
    folder = compiled(quantized, exact=False)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    description = json.loads((folder / "engine.json").read_text())
    assert description == description | {
        "schema": "llmopt.engine/1",
        "target": "openvino",
        "model_type": "llama",
        "max_context_tokens": 256,
        "vocab_size": 320,
        "eos_token_ids": [0],
        "properties": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128, "INFERENCE_PRECISION_HINT": "f32"},
    }
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_outcome_records_what_was_resolved(quantized: Path, tmp_path: Path) -> None:
    outcome = compilers.compile_model(quantized, compilers.resolve({}), tmp_path, silent)
    assert outcome.status == "compiled"
    metrics = dict(outcome.metrics)
    assert metrics["lm_head"] == "int8"
    assert metrics["properties"] == {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128, "INFERENCE_PRECISION_HINT": "f32"}
    assert metrics["weight_bytes"]["i4"] == 2 * (64 * 32 * 4 * 3 + 3 * 64 * 96) // 2  # type: ignore[index,call-overload]


def test_two_builds_give_the_same_bytes(quantized: Path, compiled: Any) -> None:
    assert digests(compiled(quantized, exact=False)) == digests(compiled(quantized, exact=False))


def test_another_process_gives_the_same_bytes(quantized: Path, compiled: Any, tmp_path: Path) -> None:
    out = tmp_path / "a folder of another name"
    out.mkdir()
    script = (
        "import sys, pathlib\n"
        "from llmopt import compilers\n"
        "from llmopt.artifacts.outcome import silent\n"
        "target = compilers.resolve({'aot': False})\n"
        "compilers.compile_model(pathlib.Path(sys.argv[1]), target, pathlib.Path(sys.argv[2]), silent)\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, quantized, out], check=True, env=environment, cwd=tmp_path)
    assert digests(out) == digests(compiled(quantized, exact=False))
    assert [p.name for p in tmp_path.iterdir()] == [out.name]  # nothing left in the home folder


def test_tokenizer_is_that_of_the_checkpoint(quantized: Path, compiled: Any) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(quantized)
    tokenizer = load("openvino_genai").Tokenizer(str(compiled(quantized)))
    for text in ("the quick brown fox", " jumps  over\n\tthe lazy dog", "naïve 日本語 🦊", "<|user|>then<|end|>"):
        ids = tokenizer.encode(text).input_ids.data[0].tolist()
        assert ids == expected(text)["input_ids"]
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "jump"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == expected.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|>jump\n<|assistant|>"


def test_generation_config_says_where_to_stop(make_checkpoint: Any, compiled: Any) -> None:
    model = make_checkpoint("llama", vocab_size=384)
    (model / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert json.loads((compiled(model) / "engine.json").read_text())["eos_token_ids"] == [3, 4]
    (model / "generation_config.json").unlink()
    assert json.loads((compiled(model) / "engine.json").read_text())["eos_token_ids"] == [0]


def test_plain_model_leaves_the_precision_to_the_plugin(make_checkpoint: Any, compiled: Any) -> None:
    folder = compiled(make_checkpoint("llama"), exact=False)
    properties = json.loads((folder / "engine.json").read_text())["properties"]
    assert properties == {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def test_weights_that_are_not_numbers_are_found_by_compiling(make_checkpoint: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_checkpoint("llama", vocab_size=328)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(LlmoptError, match="logits are not numbers"):
        compilers.compile_model(model, compilers.resolve({}), tmp_path, silent)


def test_model_without_a_tokenizer_is_refused(make_checkpoint: Any) -> None:
    model = make_checkpoint("llama", vocab_size=336)
    (model / "tokenizer.json").unlink()
    with pytest.raises(LlmoptError, match="no tokenizer") as caught:
        compilers.check(model, compilers.resolve({}))
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("file", "message"),
    [("tokenizer.json", "cannot be converted for OpenVINO"), ("generation_config.json", "is not JSON")],
)
def test_damaged_json_is_named(file: str, message: str, make_checkpoint: Any, tmp_path: Path) -> None:
    model = make_checkpoint("llama", vocab_size=352)
    before = (model / file).read_bytes()
    (model / file).write_bytes(before[: len(before) // 2])
    try:
        with pytest.raises(LlmoptError, match=message):
            compilers.compile_model(model, compilers.resolve({"aot": False}), tmp_path, silent)
    finally:
        (model / file).write_bytes(before)


def test_quantized_linear_without_its_scale_is_refused(make_checkpoint: Any, quantize: Any) -> None:
    from safetensors.torch import load_file, save_file

    model = quantize(make_checkpoint("llama", tie_word_embeddings=True), W4)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(LlmoptError, match=r"`model.layers.1.mlp.up_proj.weight_scale`"):
        compilers.check(model, compilers.resolve({}))


@pytest.mark.parametrize("missing", ["openvino", "openvino_tokenizers"])
def test_missing_backend_says_how_to_install_it(
    missing: str, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("llmopt.compilers.ov.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    target = compilers.resolve({})
    compilers.check(quantized, target)
    with pytest.raises(BackendMissingError, match=f"`{missing}`") as caught:
        compilers.compile_model(quantized, target, tmp_path, silent)
    assert caught.value.code is Exit.BACKEND_MISSING
    assert caught.value.hint == "pip install 'llmopt[openvino]'"
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_named(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.compilers.ov import save as openvino_save

    real = openvino_save.ov.save_model

    def cut_short(model: Any, file: Path, **options: Any) -> None:
        real(model, file, **options)
        weights = file.with_suffix(".bin")
        os.truncate(weights, weights.stat().st_size - 100)

    monkeypatch.setattr(openvino_save.ov, "save_model", cut_short)
    with pytest.raises(LlmoptError, match=r"`openvino_model.bin` could not be written") as caught:
        compilers.compile_model(quantized, compilers.resolve({}), tmp_path, silent)
    assert caught.value.hint == "is there room on the disk?"


def test_int8_rounding_survives_a_row_of_zeros(make_checkpoint: Any, compiled: Any, engine: Any) -> None:
    from safetensors.torch import load_file, save_file

    model = make_checkpoint("llama", vocab_size=344)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][7] = 0
    save_file(tensors, model / "model.safetensors")
    logits = engine(compiled(model, lm_head="int8"))([1, 2, 3])
    assert np.all(logits[:, 7] == 0)
    assert np.isfinite(logits).all()
