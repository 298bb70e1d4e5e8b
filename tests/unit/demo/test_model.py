"""The model folder that ships in demo/model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType

import pytest

HARD_TEXT = "def f(x):\n\treturn x  # naïve “quotes”, 漢字, \U0001f600\r\n\n    <|user|> 3.14159\x7f"


def test_the_folder_is_at_most_8_mb(model_folder: Path) -> None:
    assert sum(p.stat().st_size for p in model_folder.rglob("*")) <= 8_000_000


def test_the_record_names_the_shipped_bytes(model_folder: Path) -> None:
    record = json.loads((model_folder / "TRAINING.json").read_text("utf-8"))
    for file, key in (("model.safetensors", "model_safetensors_sha256"), ("tokenizer.json", "tokenizer_json_sha256")):
        assert hashlib.sha256((model_folder / file).read_bytes()).hexdigest() == record[key]


def test_the_shape_is_that_of_a_small_llama(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text("utf-8"))
    shape = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "intermediate_size", "vocab_size", "tie_word_embeddings", "max_position_embeddings", "dtype")  # fmt: skip
    assert [config[key] for key in shape] == ["llama", 256, 5, 4, 2, 64, 512, 2048, True, 1024, "bfloat16"]


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


def test_any_text_goes_through_the_tokenizer_and_comes_back(tokenizer, text_folder: Path) -> None:
    for text in (HARD_TEXT, (text_folder / "heldout.txt").read_text("utf-8")):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_have_the_first_ids(tokenizer) -> None:
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"])
    assert ids == [0, 1, 2, 3]
    assert tokenizer.eos_token_id == 0
    assert len(tokenizer) == 2048


def test_a_chat_is_told_with_the_role_tokens(tokenizer) -> None:
    turns = [("user", "Hi"), ("assistant", "Yes"), ("user", "?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    told = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert told == "<|user|>\nHi\n<|assistant|>\nYes<|endoftext|><|user|>\n?\n<|assistant|>\n"


def test_openvino_takes_the_tokenizer(tokenizer, text_folder: Path) -> None:
    openvino = pytest.importorskip("openvino")
    convert = pytest.importorskip("openvino_tokenizers").convert_tokenizer
    to_ids, to_text = (
        openvino.compile_model(part, "CPU", {"INFERENCE_NUM_THREADS": 1})
        for part in convert(tokenizer, with_detokenizer=True, skip_special_tokens=False)
    )
    for text in (HARD_TEXT, (text_folder / "heldout.txt").read_text("utf-8")[:5000]):
        ids = to_ids([text])["input_ids"]
        assert ids[0].tolist() == tokenizer(text).input_ids
        assert to_text(ids)["string_output"][0] == text


def test_the_heldout_loss_is_the_recorded_one(
    train: ModuleType, tokenizer, model_folder: Path, text_folder: Path
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    tokens = torch.tensor(tokenizer((text_folder / "heldout.txt").read_text("utf-8")).input_ids)
    recorded = json.loads((model_folder / "TRAINING.json").read_text("utf-8"))["heldout_loss"]
    assert train.heldout_loss(model, tokens) == pytest.approx(recorded, abs=0.01)
    assert recorded < 3
