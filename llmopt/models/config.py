"""What config.json says about a decoder, checked against the family table and against every tensor's shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmopt.errors import LlmoptError, nearest
from llmopt.models.checkpoint import FLOATS, Checkpoint
from llmopt.models.families import ATTN_NORM, DOWN, FAMILIES, GATE, K_NORM, MLP_NORM, Q_NORM, UP, Family, K, O, Q, V
from llmopt.models.rope import Rope


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """The sizes of a decoder-only model. `sliding_window` is in tokens, None where attention sees everything."""

    family: Family
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope: Rope
    tie_embeddings: bool
    max_positions: int
    sliding_window: int | None
    biases: frozenset[str]  # linears of a block that have one
    eos_token_ids: tuple[int, ...]
    dtype: str  # of the embedding, as safetensors names it: "BF16"

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> DecoderConfig:
        """Raises LlmoptError naming the first thing that is not supported, missing or of a wrong shape.

        Of a quantized checkpoint, the linears' own tensors are checked by `llmopt.formats`.
        """
        values = checkpoint.config
        family = _family(values)
        heads, hidden = _int(values, "num_attention_heads"), _int(values, "hidden_size")
        tied = bool(values.get("tie_word_embeddings", False))
        config = cls(
            family=family,
            hidden_size=hidden,
            layers=_int(values, "num_hidden_layers"),
            heads=heads,
            kv_heads=_int(values, "num_key_value_heads", heads),
            head_dim=_int(values, "head_dim", hidden // heads),
            intermediate_size=_int(values, "intermediate_size"),
            vocab_size=_int(values, "vocab_size"),
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            rope=Rope.from_config(values),
            tie_embeddings=tied or not any(name.startswith(f"{family.head}.") for name in checkpoint.tensors),
            max_positions=_int(values, "max_position_embeddings"),
            sliding_window=_sliding_window(family, values),
            biases=frozenset(
                linear for site in family.sites for linear in site.linears if _flag(family.bias_of(linear), values)
            ),
            eos_token_ids=_token_ids(values.get("eos_token_id")),
            dtype=_embedding_dtype(checkpoint, family),
        )
        if config.heads % config.kv_heads:
            raise LlmoptError(f"{config.heads} attention heads are not a multiple of {config.kv_heads} KV heads")
        config._check_tensors(checkpoint)
        return config

    def block(self, index: int) -> str:
        return self.family.block.format(index)

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """(out features, in features) of a linear of a block."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            Q: (queries, self.hidden_size),
            K: (keys, self.hidden_size),
            V: (keys, self.hidden_size),
            O: (self.hidden_size, queries),
            GATE: (self.intermediate_size, self.hidden_size),
            UP: (self.intermediate_size, self.hidden_size),
            DOWN: (self.hidden_size, self.intermediate_size),
        }[linear]

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a plain block, by its name within the block."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{ATTN_NORM}.weight": (self.hidden_size,),
            f"{MLP_NORM}.weight": (self.hidden_size,),
        }
        if self.family.qk_norm:
            shapes |= {f"{Q_NORM}.weight": (self.head_dim,), f"{K_NORM}.weight": (self.head_dim,)}
        for site in self.family.sites:
            for linear in site.linears:
                shapes[f"{linear}.weight"] = self.linear_shape(linear)
                if linear in self.biases:
                    shapes[f"{linear}.bias"] = self.linear_shape(linear)[:1]
        return shapes

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor outside the blocks: embedding, final norm and, unless tied, the head."""
        table = (self.vocab_size, self.hidden_size)
        shapes = {f"{self.family.embedding}.weight": table, f"{self.family.final_norm}.weight": (self.hidden_size,)}
        return shapes if self.tie_embeddings else shapes | {f"{self.family.head}.weight": table}

    def _check_tensors(self, checkpoint: Checkpoint) -> None:
        quantized = "quantization_config" in checkpoint.config
        expected: dict[str, tuple[int, ...]] = dict(self.outer_shapes())
        for index in range(self.layers):
            expected |= {f"{self.block(index)}.{name}": shape for name, shape in self.block_shapes().items()}
        for name, shape in expected.items():
            info = checkpoint.tensors.get(name)
            linear = name.endswith(("_proj.weight", f"{self.family.head}.weight"))
            if quantized and linear and (info is None or info.dtype not in FLOATS):
                continue
            if info is None:
                raise LlmoptError(
                    f"the checkpoint has no tensor `{name}`",
                    hint="is a shard missing, or does config.json belong to another model?",
                )
            if info.shape != shape:
                raise LlmoptError(
                    f"`{name}` has the shape {list(info.shape)} where config.json says {list(shape)}",
                    hint="config.json and the weights do not belong together",
                )
            if info.dtype not in FLOATS and not quantized:
                raise LlmoptError(f"`{name}` has the dtype `{info.dtype}`; a plain checkpoint holds floats")


def _family(values: Mapping[str, Any]) -> Family:
    model_type = values.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise LlmoptError(f"the model type `{model_type}` is not supported", hint=nearest(str(model_type), FAMILIES))
    for key, allowed in family.requires.items():
        if key in values and values[key] not in allowed:
            raise LlmoptError(
                f"`{key}: {values[key]}` is not supported for the model type `{model_type}`",
                hint="supported: " + ", ".join(f"`{v}`" for v in allowed),
            )
    return family


def _int(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LlmoptError(f"config.json needs `{key}` as a positive whole number, not `{value}`")
    return value


def _flag(bias: bool | str, values: Mapping[str, Any]) -> bool:
    return bool(values.get(bias, False)) if isinstance(bias, str) else bias


def _sliding_window(family: Family, values: Mapping[str, Any]) -> int | None:
    window = values.get("sliding_window")
    if family.sliding_window == "never" or not isinstance(window, int):
        return None
    if family.sliding_window == "use_sliding_window" and not values.get("use_sliding_window", False):
        return None
    kinds = set(values.get("layer_types") or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"} or values.get("max_window_layers") not in (None, 0):
        raise LlmoptError("sliding-window attention in only some of the layers is not supported")
    return window


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)  # type: ignore[return-value]


def _embedding_dtype(checkpoint: Checkpoint, family: Family) -> str:
    info = checkpoint.tensors.get(f"{family.embedding}.weight")
    if info is None:
        raise LlmoptError(
            f"the checkpoint has no tensor `{family.embedding}.weight`",
            hint="is a shard missing, or does config.json belong to another model?",
        )
    return info.dtype
