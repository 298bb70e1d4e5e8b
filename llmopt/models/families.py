"""Model families as data: a row says where the tensors are, how a block is laid out, and what config.json calls it.

The decoder, the quantizers, the evaluation and the IR builders read these rows; none of them has code for a family.
Where one model type comes in several layouts, `Variant`s change facts of its row by what config.json says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

ATTN_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
Q, K, V, O = (f"self_attn.{x}_proj" for x in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{x}_proj" for x in ("gate", "up", "down"))
Q_NORM, K_NORM = "self_attn.q_norm", "self_attn.k_norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of a linear that make a site's input, as `count` runs of `size` rows, `stride` apart from `start` on.

    Each run makes `repeats` consecutive runs of the input's channels: a KV head is read by that many query heads.
    """

    start: int = 0
    size: int
    count: int = 1
    stride: int = 0
    repeats: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """What can absorb the inverse of a scale of a site's input, by its prefix within the block.

    rows None: a norm, whose weight (and bias) is divided. Else: those rows of a linear's weight (and bias) are.
    """

    name: str
    rows: Rows | None = None

    @property
    def is_norm(self) -> bool:
        return self.rows is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """The linears of a block that read the same input.

    role: what the block does with it; with a shared norm, the linears of `qkv` include those of the MLP.
    scaled_by: what can absorb a scale of the input, whose inverse the linears' columns then take; None where nothing
    can, because something that is not linear, or not quantized, lies between.
    adds: the output is added to the residual stream of every token as it is.
    expert: the expert whose linears they are; its input is only the tokens routed to it, [tokens, I], maybe none.
    """

    name: str
    role: Literal["qkv", "o", "up", "down"]
    linears: tuple[str, ...]
    scaled_by: Fold | None
    adds: bool = False
    expert: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A mixture of gated MLPs in place of the MLP; `{}` stands for the expert's number.

    `width` is the config key of an expert's inner size. normalized: the weights of a token's experts sum to one; a
    fact of the family (bool) or the config key that says so (str). The layers that have experts are those of
    `decoder_sparse_step` (every one without it) but not of `mlp_only_layers`.
    """

    router: str
    gate: str
    up: str
    down: str
    width: str
    normalized: bool | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Facts that replace those of a row where config.json holds the values of `when` (the row's defaults count)."""

    when: Mapping[str, object]
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row of the table. A `bool | str` is a fact of the family (bool) or the config key that says so (str)."""

    model_type: str
    architecture: str

    # The tensors outside the blocks, and the prefix of a block.
    embedding: str = "model.embed_tokens"
    positions: str | None = None  # a table of learned positions; None: rotary
    position_offset: int = 0  # rows of that table before the first position's
    block: str = "model.layers.{}"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    # Norms. The MLP reads `mlp_norm`, or what attention reads (None). Outputs pass `post_*` before they are added.
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0  # what is added to a norm's weight: Gemma stores w - 1
    attn_norm: str = ATTN_NORM
    mlp_norm: str | None = MLP_NORM
    post_attn_norm: str | None = None
    post_mlp_norm: str | None = None
    parallel: bool | str = False  # attention and MLP read the same residual stream

    # Attention. One linear of `qkv` is fused: all of q, k, v in turn (stacked), or KV head by KV head (grouped).
    qkv: tuple[str, ...] = (Q, K, V)
    qkv_layout: Literal["separate", "stacked", "grouped"] = "separate"
    o: str = O
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    qk_norm: bool = False
    multi_query: bool = False  # one KV head, whatever config.json says
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    partial_rotary: bool = False
    local_rope: bool = False  # layers with a window have a rotary embedding of their own
    #: Which layers look back only so far: all; those that `layer_types` or `max_window_layers` says; all but each n-th.
    windows: Literal["never", "all", "from", "pattern"] = "never"
    window_flag: str | None = None  # config key without which there is no window

    # MLP. One linear of `up` is ungated, or gated and fused (gate, then up).
    up: tuple[str, ...] = (GATE, UP)
    gated: bool = True
    down: str = DOWN
    mlp_bias: bool | str = False
    experts: Experts | None = None
    activations: tuple[str, ...] = ("silu",)
    mlp_ratio: int | None = None  # inner size over hidden size, where config.json is silent

    scaled_embedding: bool = False  # times the root of the hidden size
    #: What config.json calls things, where that is not as with Llama.
    keys: Mapping[str, str] = field(default_factory=dict)
    #: What holds where config.json is silent, by Llama's names.
    defaults: Mapping[str, object] = field(default_factory=dict)
    #: Config keys that must hold one of these values when present.
    requires: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    #: Config keys that must be equal when present.
    same: Mapping[str, str] = field(default_factory=dict)
    variants: tuple[Variant, ...] = ()


_QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    windows="from",
    window_flag="use_sliding_window",
    defaults={"max_window_layers": 28},
)
_GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    norm_offset=1.0,
    mlp_norm="pre_feedforward_layernorm",
    post_attn_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    windows="pattern",
    activations=("gelu_pytorch_tanh",),
    scaled_embedding=True,
    keys={"hidden_act": "hidden_activation"},
    defaults={
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    requires={"use_bidirectional_attention": (False, None)},
)
_GEMMA3_DEFAULTS = {
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")

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
        Family(model_type="mistral", architecture="MistralForCausalLM", windows="all"),
        _QWEN2,
        replace(
            _QWEN2,
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
        ),
        Family(
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            windows="all",
            experts=Experts(
                router="block_sparse_moe.gate",
                gate="block_sparse_moe.experts.{}.w1",
                up="block_sparse_moe.experts.{}.w3",
                down="block_sparse_moe.experts.{}.w2",
                width="intermediate_size",
                normalized=True,
            ),
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
        ),
        Family(
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
            windows="all",
            window_flag="use_sliding_window",
            experts=Experts(
                router="mlp.gate",
                gate="mlp.experts.{}.gate_proj",
                up="mlp.experts.{}.up_proj",
                down="mlp.experts.{}.down_proj",
                width="moe_intermediate_size",
                normalized="norm_topk_prob",
            ),
            keys={"num_local_experts": "num_experts"},
            defaults={"num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        ),
        Family(
            model_type="phi3",
            architecture="Phi3ForCausalLM",
            qkv=("self_attn.qkv_proj",),
            qkv_layout="stacked",
            up=("mlp.gate_up_proj",),
            rope_types=("default", "longrope"),
            partial_rotary=True,
            windows="all",
            defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        ),
        _GEMMA2,
        replace(
            _GEMMA2,
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            qk_norm=True,
            local_rope=True,
            defaults={**_GEMMA2.defaults, **_GEMMA3_DEFAULTS},
        ),
        Family(
            model_type="gpt_neox",
            architecture="GPTNeoXForCausalLM",
            embedding="gpt_neox.embed_in",
            block="gpt_neox.layers.{}",
            final_norm="gpt_neox.final_layer_norm",
            head="embed_out",
            norm="layer",
            parallel="use_parallel_residual",
            qkv=("attention.query_key_value",),
            qkv_layout="grouped",
            o="attention.dense",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            rope_types=("default", "linear"),
            partial_rotary=True,
            up=("mlp.dense_h_to_4h",),
            gated=False,
            down="mlp.dense_4h_to_h",
            mlp_bias=True,
            activations=(*_GELUS, "relu"),
            keys={
                "rms_norm_eps": "layer_norm_eps",
                "rope_theta": "rotary_emb_base",
                "partial_rotary_factor": "rotary_pct",
            },
            defaults={
                "rms_norm_eps": 1e-5,
                "hidden_act": "gelu",
                "partial_rotary_factor": 0.25,
                "use_parallel_residual": True,
                "attention_bias": True,
            },
        ),
        Family(
            model_type="falcon",
            architecture="FalconForCausalLM",
            embedding="transformer.word_embeddings",
            block="transformer.h.{}",
            final_norm="transformer.ln_f",
            norm="layer",
            qkv=("self_attention.query_key_value",),
            qkv_layout="grouped",
            o="self_attention.dense",
            qkv_bias="bias",
            o_bias="bias",
            rope_types=("default", "linear"),
            up=("mlp.dense_h_to_4h",),
            gated=False,
            down="mlp.dense_4h_to_h",
            mlp_bias="bias",
            mlp_ratio=4,
            activations=(*_GELUS, "relu"),
            keys={
                "num_key_value_heads": "num_kv_heads",
                "intermediate_size": "ffn_hidden_size",
                "rms_norm_eps": "layer_norm_epsilon",
                "hidden_act": "activation",
            },
            defaults={
                "rms_norm_eps": 1e-5,
                "hidden_act": "gelu",
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
                "new_decoder_architecture": False,
                "multi_query": True,
                "parallel_attn": True,
            },
            requires={"alibi": (False, None)},
            variants=(
                Variant(when={"multi_query": True}, facts={"multi_query": True, "qkv_layout": "stacked"}),
                Variant(when={"parallel_attn": True}, facts={"parallel": True, "mlp_norm": None}),
                Variant(
                    when={"new_decoder_architecture": True},
                    facts={
                        "multi_query": False,
                        "qkv_layout": "grouped",
                        "parallel": True,
                        "attn_norm": "ln_attn",
                        "mlp_norm": "ln_mlp",
                    },
                ),
                Variant(
                    when={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
                    facts={"attn_norm": ATTN_NORM, "mlp_norm": None},
                ),
            ),
        ),
        Family(
            model_type="opt",
            architecture="OPTForCausalLM",
            embedding="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            position_offset=2,
            block="model.decoder.layers.{}",
            final_norm="model.decoder.final_layer_norm",
            norm="layer",
            attn_norm="self_attn_layer_norm",
            mlp_norm="final_layer_norm",
            o="self_attn.out_proj",
            qkv_bias="enable_bias",
            o_bias="enable_bias",
            up=("fc1",),
            gated=False,
            down="fc2",
            mlp_bias="enable_bias",
            activations=(*_GELUS, "relu"),
            keys={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
            defaults={
                "rms_norm_eps": 1e-5,
                "hidden_act": "relu",
                "enable_bias": True,
                "tie_word_embeddings": True,
            },
            requires={
                "do_layer_norm_before": (True,),
                "_remove_final_layer_norm": (False,),
                "layer_norm_elementwise_affine": (True,),
            },
            same={"word_embed_proj_dim": "hidden_size"},
        ),
    )
}
