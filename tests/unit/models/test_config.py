from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.errors import LlmoptError
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def change(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def read(folder: Path) -> DecoderConfig:
    return DecoderConfig.read(Checkpoint.open(folder))


def test_an_unknown_family_names_the_nearest(copy: Path) -> None:
    with pytest.raises(LlmoptError, match="`lama` is not supported") as caught:
        read(change(copy, model_type="lama"))
    assert "`llama`" in str(caught.value.hint)


def test_an_unsupported_rope_type_is_named(copy: Path) -> None:
    with pytest.raises(LlmoptError, match="rope type `yarn`"):
        read(change(copy, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}))


def test_the_old_spelling_of_rope_is_understood(copy: Path) -> None:
    config = read(change(copy, rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}))
    assert (config.rope.type, config.rope.theta, config.rope.factor) == ("linear", 5e5, 2.0)


def test_an_unsupported_activation_is_named(copy: Path) -> None:
    with pytest.raises(LlmoptError, match="hidden_act: gelu"):
        read(change(copy, hidden_act="gelu"))


@pytest.mark.parametrize("value", [None, 0, -1, "128", True])
def test_a_size_that_is_no_size_is_an_error(copy: Path, value: object) -> None:
    with pytest.raises(LlmoptError, match="hidden_size"):
        read(change(copy, hidden_size=value))


def test_a_tensor_of_a_wrong_shape_is_named(copy: Path) -> None:
    with pytest.raises(LlmoptError, match=r"`model.layers.0.mlp.\w+_proj.weight` has the shape"):
        read(change(copy, intermediate_size=384))


def test_a_missing_tensor_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(LlmoptError, match=r"no tensor `model.layers.1.mlp.up_proj.weight`"):
        read(copy)


def test_integers_where_weights_should_be_are_an_error(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(LlmoptError, match="dtype `I8`"):
        read(copy)


def test_a_layer_type_that_is_unknown_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_checkpoint("gemma2"), tmp_path / "model"))
    with pytest.raises(LlmoptError, match="`layer_types` must say"):
        read(change(folder, layer_types=["full_attention", "chunked_attention"] * 2))


FACTORS = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
REFUSED = [
    ("falcon", {"alibi": True}, "`alibi: True`"),
    ("falcon", {"activation": "mish"}, "`activation: mish`"),
    ("opt", {"do_layer_norm_before": False}, "`do_layer_norm_before: False`"),
    ("opt", {"word_embed_proj_dim": 64}, "`word_embed_proj_dim: 64`"),
    ("opt", {"layer_norm_elementwise_affine": False}, "`layer_norm_elementwise_affine: False`"),
    ("gemma2", {"use_bidirectional_attention": True}, "`use_bidirectional_attention: True`"),
    ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type `yarn`"),
    ("phi3", {"rope_parameters": FACTORS}, "`short_factor` of the rotary embedding has 1 entries"),
    ("falcon", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "`partial_rotary_factor`"),
    ("mixtral", {"num_experts_per_tok": 5}, "5 of 4 experts"),
]


@pytest.mark.parametrize(("model_type", "values", "named"), REFUSED)
def test_what_a_family_cannot_do_is_refused_by_name(
    make_checkpoint: Callable[..., Path], tmp_path: Path, model_type: str, values: dict[str, Any], named: str
) -> None:
    folder = Path(shutil.copytree(make_checkpoint(model_type), tmp_path / "model"))
    with pytest.raises(LlmoptError, match=named):
        read(change(folder, **values))


def without(folder: Path, *keys: str, **values: Any) -> Path:
    file = folder / "config.json"
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in keys}
    file.write_text(json.dumps(kept | values))
    return folder


OLD_SPELLINGS = [
    ("gpt_neox", ("rope_parameters", "attention_bias"), {"rotary_pct": 0.25, "rotary_emb_base": 10000}),
    ("gemma2", ("rope_parameters", "layer_types"), {"rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh"}),
    (
        "gemma3_text",
        ("rope_parameters", "layer_types"),
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2},
    ),
    ("falcon", ("rope_parameters", "max_position_embeddings", "ffn_hidden_size", "num_ln_in_parallel_attn"), {}),
    ("mixtral", ("rope_parameters",), {"rope_theta": 1e6}),
    ("qwen3_moe", ("rope_parameters", "num_local_experts"), {"rope_theta": 1e4, "num_experts": 4}),
]


@pytest.mark.parametrize(("model_type", "keys", "values"), OLD_SPELLINGS)
def test_older_configs_mean_the_same(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    model_type: str,
    keys: tuple[str, ...],
    values: dict[str, Any],
) -> None:
    options = {"max_position_embeddings": 2048, "ffn_hidden_size": 512} if model_type == "falcon" else {}
    folder = Path(shutil.copytree(make_checkpoint(model_type, **options), tmp_path / "model"))
    before = read(folder)
    assert read(without(folder, *keys, **values)) == before


def test_every_tensor_of_the_checkpoint_is_expected(make_checkpoint: Callable[..., Path]) -> None:
    for model_type in ("mixtral", "qwen3_moe", "gpt_neox", "gemma3_text", "opt"):
        checkpoint = Checkpoint.open(make_checkpoint(model_type))
        config = DecoderConfig.read(checkpoint)
        expected = set(config.outer_shapes())
        for index in range(config.layers):
            expected |= {f"{config.block(index)}.{name}" for name in config.block_shapes(index)}
        assert set(checkpoint.tensors) == expected


def test_every_linear_is_at_one_site(make_checkpoint: Callable[..., Path]) -> None:
    for model_type in ("llama", "phi3", "falcon", "opt", "mixtral", "qwen3_moe"):
        config = read(make_checkpoint(model_type))
        for index in range(config.layers):
            linears = [name for site in config.sites(index) for name in site.linears]
            assert sorted(linears) == sorted(config.linear_shapes(index))
