"""Model families as data: one row says where the tensors are and which linears share an input.

The quantizers, the evaluation and the IR builders read these rows; none of them has code for a family.
A block of every family so far is: norm, attention, residual, norm, gated MLP, residual (pre-norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """The linears of a block that read the same input, and the tensor that can absorb that input's scale.

    `scaled_by` is a norm (its weight is divided) or a linear (its output rows are); the site's columns are multiplied.
    `adds`: the output is added to the residual stream.
    """

    name: str
    linears: tuple[str, ...]
    scaled_by: str
    adds: bool = False


ATTN_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
Q, K, V, O = (f"self_attn.{x}_proj" for x in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{x}_proj" for x in ("gate", "up", "down"))
Q_NORM, K_NORM = "self_attn.q_norm", "self_attn.k_norm"

#: In the order in which a block meets them.
SITES = (
    Site(name="qkv", linears=(Q, K, V), scaled_by=ATTN_NORM),
    Site(name="o", linears=(O,), scaled_by=V, adds=True),
    Site(name="gate_up", linears=(GATE, UP), scaled_by=MLP_NORM),
    Site(name="down", linears=(DOWN,), scaled_by=UP, adds=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row of the table. A `bias` is a fact of the family (bool) or the config key that says so (str)."""

    model_type: str
    architecture: str
    sites: tuple[Site, ...] = SITES
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    #: Where config.json says that attention looks back only so far.
    sliding_window: Literal["never", "always", "use_sliding_window"] = "never"
    embedding: str = "model.embed_tokens"
    block: str = "model.layers.{}"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    #: Config keys that must hold one of these values when present.
    requires: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: {"hidden_act": ("silu",)})

    def bias_of(self, linear: str) -> bool | str:
        if linear in (Q, K, V):
            return self.qkv_bias
        return self.o_bias if linear == O else self.mlp_bias


FAMILIES: Mapping[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
        ),
        Family(model_type="mistral", architecture="MistralForCausalLM", sliding_window="always"),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            sliding_window="use_sliding_window",
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
            sliding_window="use_sliding_window",
        ),
    )
}
