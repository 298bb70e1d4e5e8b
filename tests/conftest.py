"""Tiny checkpoints of every family, made by transformers, with a tokenizer of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

pytest_plugins = ["servers.fixtures"]

REPOSITORY = Path(__file__).resolve().parents[1]

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}
#: What most families call the rest of the shape, and those that call it otherwise or have more of it.
LLAMA: dict[str, Any] = {"intermediate_size": 256, "num_key_value_heads": 2}
GEMMA: dict[str, Any] = {"head_dim": 32, "sliding_window": 20, "query_pre_attn_scalar": 64, "num_hidden_layers": 4}
OWN_SHAPE: dict[str, dict[str, Any]] = {
    "gemma2": LLAMA | GEMMA,
    "gemma3_text": LLAMA | GEMMA | {"sliding_window_pattern": 2},
    "gpt_neox": {"intermediate_size": 256},
    "falcon": {"ffn_hidden_size": 256},
    "opt": {"ffn_dim": 256},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": LLAMA
    | {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
}

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def text() -> Path:
    """A calibration text: the one that ships with the package."""
    return REPOSITORY / "llmopt" / "profiles" / "text" / "calibration.txt"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.read_text(encoding="utf-8")[:20000]], trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> MakeCheckpoint:
    """make_checkpoint("qwen3", seed=0, dtype="bfloat16", shard_bytes=None, **config) -> folder with random weights.

    Weights are larger than at initialisation and norms are not one, so that a mistake shows in the logits.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def make(
        model_type: str = "llama", *, seed: int = 0, dtype: str = "bfloat16", shards: int = 1, **config: Any
    ) -> Path:
        folder = tmp_path_factory.mktemp(model_type)
        shape = SHAPE | OWN_SHAPE.get(model_type, LLAMA)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(shape | config)))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.normal_(1.0, 0.3)
            else:
                parameter.data.mul_(3)
        model = model.to(getattr(torch, dtype))
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(folder, max_shard_size=size // shards + 1)
        (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(make_checkpoint: MakeCheckpoint) -> Path:
    """A random Llama with tied embeddings. Not to be changed: copy it first."""
    return make_checkpoint("llama", tie_word_embeddings=True)
