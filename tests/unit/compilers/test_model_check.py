"""A checkpoint in order passes, whatever its family and format: strict is not the same as wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmopt.compilers.model_check import check_model
from llmopt.formats.scheme import Scheme
from llmopt.models.families import FAMILIES

W4 = Scheme(bits=4, group_size=32, symmetric=True)
W8A8 = Scheme(bits=8, group_size=-1, symmetric=True, activations="static")
FP8 = Scheme(bits=8, group_size=0, symmetric=True, activations="static", kind="float")

#: What a family's config asks for beside the sizes of all.
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "mlp_only_layers": [1]},
    "gemma2": {"sliding_window": 20},
    "gemma3_text": {"sliding_window": 20},
    "gpt_neox": {"num_attention_heads": 2},
    "opt": {"num_attention_heads": 2, "ffn_dim": 96, "word_embed_proj_dim": 64},
}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "falcon"])  # its config takes no head_dim
def test_plain_checkpoints_of_every_family_pass(make_checkpoint: Any, family: str) -> None:
    report = check_model(make_checkpoint(family, **SIZES.get(family, {})), "checkpoint")
    assert report.tensors > 10


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_no_missing_one(make_checkpoint: Any, tied: bool) -> None:
    check_model(make_checkpoint("qwen2", tie_word_embeddings=tied), "checkpoint")


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "phi3"])
@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        (W4, "compressed-tensors"),
        (replace(W4, symmetric=False), "compressed-tensors"),
        (replace(W4, bits=3), "gptq"),
        (W4, "awq"),
        (W8A8, "compressed-tensors"),
        (replace(W8A8, activations="dynamic"), "compressed-tensors"),
        (FP8, "compressed-tensors"),
        (FP8, "modelopt"),
        (replace(FP8, group_size=-1, activations="dynamic"), "modelopt"),
        (W8A8, "modelopt"),
    ],
    ids=str,
)
def test_quantized_checkpoints_of_every_format_pass(
    make_checkpoint: Any, quantize: Any, family: str, scheme: Scheme, format: str
) -> None:
    plain = make_checkpoint(family, **SIZES.get(family, {}))
    assert check_model(quantize(plain, scheme, format), "checkpoint").tensors > 20


def test_a_quantized_head_is_checked_too(make_checkpoint: Any, quantize: Any) -> None:
    check_model(quantize(make_checkpoint("llama"), W4, head=True), "checkpoint")
