from __future__ import annotations

import json
import shutil
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


def test_a_window_in_some_layers_only_is_refused(copy: Path) -> None:
    window = {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 16}
    with pytest.raises(LlmoptError, match="only some of the layers"):
        read(change(copy, **window, layer_types=["full_attention", "sliding_attention"]))
