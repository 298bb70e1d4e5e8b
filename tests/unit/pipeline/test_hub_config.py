"""A model of the hub is planned by its config.json: its weights stay where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import silent
from llmopt.errors import LlmoptError
from llmopt.pipeline.hub import Reference, fetch_config
from llmopt.planner.precision import stored
from llmopt.planner.shape import read

CONFIG = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 14336,
}


def fetched(hub: Any, **more: Any) -> Path:
    files = {"config.json": CONFIG, **more}
    hub.add("some/llama", {name: json.dumps(value).encode() for name, value in files.items()})
    reference = Reference.parse("some/llama")
    assert reference is not None
    return fetch_config(reference, silent)


def test_the_sizes_are_read_and_no_weights_are_fetched(hub: Any) -> None:
    file = fetched(hub, **{"model.safetensors": "sixteen gigabytes"})
    assert read(str(file)).parameters == 8_030_261_248
    assert not any("safetensors" in request for request in hub.requests)


def test_what_modelopt_says_beside_it_comes_along(hub: Any) -> None:
    file = fetched(hub, **{"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}})
    precision = stored(read(str(file)))
    assert precision is not None
    assert precision.name == "modelopt fp8"


def test_an_adapter_has_no_sizes(hub: Any) -> None:
    hub.add("some/adapter", {"adapter_config.json": b"{}"})
    reference = Reference.parse("some/adapter")
    assert reference is not None
    with pytest.raises(LlmoptError, match=r"has no `config\.json`"):
        fetch_config(reference, silent)
