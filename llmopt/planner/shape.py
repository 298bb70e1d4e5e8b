"""The sizes of a model that its memory and speed follow from, read from config.json alone.

Model types of `models.families` are read through their rows; those below are known to the planner only, and for any
other the usual keys are taken at their word, which a note says. Counts are of parameters, sizes of vectors in elements.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError, SettingsError
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.facts import Facts
from llmopt.models.families import FAMILIES, Experts, Family

_BY_COUNT = "give its number of parameters instead: `llmopt plan 70B`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """`count` linears of `rows` out features and `columns` in features, of which a token passes `active`.

    parts: how many equal parts tensor parallelism can give to its ranks (heads; 0: as many as it likes), each rank one
    part at least; None: every rank has all of it. Experts are those with a count above 1.
    """

    rows: int
    columns: int
    parts: int | None = 0
    count: int = 1
    active: int = 1

    @property
    def parameters(self) -> int:
        return self.rows * self.columns * self.count

    def share(self, ranks: int) -> float:
        """The part of it that the fullest of `ranks` holds."""
        if self.parts is None:
            return 1.0
        return 1 / ranks if self.parts == 0 else -(-self.parts // ranks) / self.parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One block. cached: elements of keys and values (or of MLA's latent) kept for each token, in `cache_parts` parts
    that tensor parallelism can divide. A pair of a query and a key costs `pair_flops` while a prompt is read and
    `decode_pair_flops` after. window: how many tokens back it looks, None for all. plain: norms, biases, routers and
    sinks, which no format quantizes.
    """

    linears: tuple[Linear, ...]
    plain: int
    cached: int
    cache_parts: int
    pair_flops: int
    decode_pair_flops: int
    window: int | None = None

    def seen(self, tokens: float) -> float:
        """How many of the last `tokens` it looks at."""
        return tokens if self.window is None else min(self.window, tokens)

    @property
    def parameters(self) -> int:
        return self.plain + sum(linear.parameters for linear in self.linears)

    @property
    def active_parameters(self) -> int:
        return self.plain + sum(linear.parameters // linear.count * linear.active for linear in self.linears)


@dataclass(frozen=True)
class ModelShape:
    """A decoder. head None: tied to the embedding. scale: what every count of weights is multiplied by, where only the
    number of parameters was given and the layers are those of a model of about that size. notes: what was assumed.
    quantization: what config.json says of how it lies on disk; stored_bytes: of its tensors there, None where unseen.
    """

    name: str
    model_type: str
    hidden_size: int
    vocab_size: int
    heads: int
    layers: tuple[Layer, ...]
    embedding: int
    other: int
    head: Linear | None
    max_positions: int | None = None
    scale: float = 1.0
    notes: tuple[str, ...] = ()
    quantization: Mapping[str, Any] | None = None
    stored_bytes: int | None = None

    @cached_property
    def parameters(self) -> int:
        return round(self.scale * (self._outside + sum(layer.parameters for layer in self.layers)))

    @cached_property
    def active_parameters(self) -> int:
        """Those that one token passes: of a mixture its own experts only."""
        return round(self.scale * (self._outside + sum(layer.active_parameters for layer in self.layers)))

    @property
    def _outside(self) -> int:
        return self.embedding + self.other + (0 if self.head is None else self.head.parameters)

    @property
    def output(self) -> Linear:
        """The linear that makes logits, the embedding's own where tied."""
        return self.head or Linear(rows=self.vocab_size, columns=self.hidden_size)

    @property
    def is_mixture(self) -> bool:
        return any(linear.count > 1 for layer in self.layers for linear in layer.linears)

    @cached_property
    def kinds(self) -> Mapping[Layer, int]:
        """How many there are of each layer: those of a model are of a few kinds only."""
        return Counter(self.layers)


def read(reference: str) -> ModelShape:
    """The shape of a model folder, of a config.json, or of a number of parameters like `70B`.

    A folder's tensors are counted too, where it has them. Raises LlmoptError for what cannot be read.
    """
    count = parameter_count(reference)
    path = Path(reference)
    if count is not None and not path.exists():
        return of_count(count, reference)
    folder, file = (path, path / "config.json") if path.is_dir() else (path.parent, path)
    if not file.is_file():
        raise LlmoptError(
            f"no model at `{reference}`", hint="give a folder with config.json, or a number of parameters like `70B`"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LlmoptError(f"`{file}` is not JSON: {error}", hint="download it again") from None
    if not isinstance(config, dict):
        raise LlmoptError(f"`{file}` is not a JSON object", hint="give the config.json of a model")
    if (beside := folder / "hf_quant_config.json").is_file():
        config.setdefault("quantization_config", {"quant_method": "modelopt", **json.loads(beside.read_text())})
    has_tensors = path.is_dir() and any(path.glob("*.safetensors"))
    checkpoint = Checkpoint.open(folder) if has_tensors else None
    if checkpoint is not None:
        config = dict(checkpoint.config)
    shape = of_config(config, name=folder.resolve().name or reference)
    return shape if checkpoint is None else _checked(shape, checkpoint)


def of_config(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """From what config.json holds; LlmoptError with a hint for an architecture that these sizes do not describe."""
    values, notes = _text_part(config)
    _refuse(values)
    facts, known = _facts(values)
    if not known:
        notes.append(f"the model type `{values.get('model_type')}` is not known: read as a decoder like Llama")
    hidden, heads = facts.size("hidden_size"), facts.size("num_attention_heads")
    layers = _layers(facts, hidden, heads)
    vocab = facts.size("vocab_size")
    positions = values.get("max_position_embeddings")
    family = facts.family
    learned = (facts.size("max_position_embeddings") + family.position_offset) * hidden if family.positions else 0
    if values.get("num_nextn_predict_layers"):
        notes.append("the layers that predict further tokens (`num_nextn_predict_layers`) are not counted")
    return ModelShape(
        name=name,
        model_type=str(values.get("model_type")),
        hidden_size=hidden,
        vocab_size=vocab,
        heads=heads,
        layers=layers,
        embedding=vocab * hidden,
        other=learned + _norm(facts, hidden),
        head=None if facts.flag("tie_word_embeddings") else Linear(rows=vocab, columns=hidden),
        max_positions=positions if isinstance(positions, int) else None,
        notes=tuple(notes),
        quantization=_quantization(config) or _quantization(values),
    )


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of how it lies on disk; LlmoptError where that is no object."""
    found = config.get("quantization_config")
    if found and not isinstance(found, Mapping):
        raise LlmoptError(f"`quantization_config` in config.json is `{found}`, not an object", hint="download it again")
    return found or None


def of_count(count: int, name: str) -> ModelShape:
    """A dense model of `count` parameters with the layers of the Llama 3 nearest to it, which a note names."""
    nearest = min(_TYPICAL, key=lambda row: abs(row["parameters"] / count - 1) + abs(count / row["parameters"] - 1))
    like = of_config({"model_type": "llama", "vocab_size": 128256, **nearest["config"]}, name=name)
    note = f"layers assumed to be those of {nearest['name']}, for a number of parameters says nothing of the KV cache"
    return replace(like, scale=count / like.parameters, notes=(note,))


def parameter_count(reference: str) -> int | None:
    """`70B` or `0.5b` as a number of parameters; None for what does not look like one; SettingsError for none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mbt])", reference.strip().lower())
    if match is None:
        return None
    count = round(float(match[1]) * {"m": 1e6, "b": 1e9, "t": 1e12}[match[2]])
    if count < 1:
        raise SettingsError(f"`{reference}` is no number of parameters", hint="for example `70B`")
    return count


# --- config.json


def _experts(width: str = "moe_intermediate_size") -> Experts:
    """Only what `Facts` reads of it: names of tensors do not matter here."""
    return Experts(router="", gate="", up="", down="", width=width, normalized=True)


#: Model types of which only the sizes are known here; `models.families` has those that can be run.
PLANNED: Mapping[str, Family] = {
    row.model_type: row
    for row in (
        Family(model_type="deepseek_v2", architecture="DeepseekV2ForCausalLM", experts=_experts()),
        Family(model_type="deepseek_v3", architecture="DeepseekV3ForCausalLM", experts=_experts()),
        Family(model_type="kimi_k2", architecture="DeepseekV3ForCausalLM", experts=_experts()),
        Family(
            model_type="gpt_oss",
            architecture="GptOssForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="pattern",
            experts=_experts("intermediate_size"),
            defaults={"attention_bias": True, "sliding_window_pattern": 2},
        ),
        Family(
            model_type="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            qkv_bias=True,
            windows="from",
            window_flag="use_sliding_window",
            experts=_experts(),
            defaults={"max_window_layers": 28},
        ),
        Family(
            model_type="glm4_moe",
            architecture="Glm4MoeForCausalLM",
            qkv_bias="attention_bias",
            qk_norm=True,
            experts=_experts(),
        ),
        Family(
            model_type="gemma", architecture="GemmaForCausalLM", defaults={"head_dim": 256, "tie_word_embeddings": True}
        ),
        Family(
            model_type="llama4_text",
            architecture="Llama4ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            experts=_experts("intermediate_size"),
        ),
    )
}

#: Llama 3, as Meta published them: what a number of parameters alone is taken for.
_TYPICAL: tuple[dict[str, Any], ...] = tuple(
    {
        "name": name,
        "parameters": parameters,
        "config": {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": head_dim,
            "intermediate_size": width,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 131072,
        },
    }
    for name, parameters, hidden, layers, heads, head_dim, width, tied in (
        ("Llama 3.2 1B", 1.24e9, 2048, 16, 32, 64, 8192, True),
        ("Llama 3.2 3B", 3.21e9, 3072, 28, 24, 128, 8192, True),
        ("Llama 3.1 8B", 8.03e9, 4096, 32, 32, 128, 14336, False),
        ("Llama 3.1 70B", 70.6e9, 8192, 80, 64, 128, 28672, False),
        ("Llama 3.1 405B", 405.9e9, 16384, 126, 128, 128, 53248, False),
    )
)

#: Keys of architectures that are no stack of attention and MLP.
_FOREIGN: Mapping[str, str] = {
    "is_encoder_decoder": "an encoder and a decoder",
    "mamba_d_state": "state-space layers",
    "ssm_cfg": "state-space layers",
    "state_size": "state-space layers",
    "linear_num_value_heads": "linear attention",
    "attn_layer_period": "state-space layers",
    "lru_width": "recurrent layers",
}
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def _text_part(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The decoder's own section of a model that also sees or hears, with a note."""
    for key in ("text_config", "llm_config", "language_config"):
        inner = config.get(key)
        if isinstance(inner, Mapping) and ("hidden_size" in inner or "num_hidden_layers" in inner):
            outer = str(config.get("model_type"))
            values = {"model_type": outer, **inner}
            if "tie_word_embeddings" in config:
                values.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
            return values, [f"of `{outer}` only the text model is counted"]
    return dict(config), []


def _refuse(values: Mapping[str, Any]) -> None:
    kinds = {str(kind) for kind in values.get("layer_types") or ()} - set(_ATTENTION)
    what = next((what for key, what in _FOREIGN.items() if values.get(key)), None)
    what = f"layers of the kind `{min(kinds)}`" if kinds else what
    if what is not None:
        raise LlmoptError(
            f"the model type `{values.get('model_type')}` has {what}, which is not planned", hint=_BY_COUNT
        )
    if "hidden_size" not in values and "hidden_size" not in _own_keys(values):
        raise LlmoptError(
            "config.json has no `hidden_size`", hint=f"is it the config.json of a decoder? Or {_BY_COUNT}"
        )


def _own_keys(values: Mapping[str, Any]) -> Mapping[str, str]:
    family = FAMILIES.get(str(values.get("model_type")))
    return {} if family is None else family.keys


def _facts(values: Mapping[str, Any]) -> tuple[Facts, bool]:
    """Through the row of its model type, and whether there is one. Rotary embeddings have no size: left out."""
    plain = {key: value for key, value in values.items() if not key.startswith(("rope_", "partial_rotary"))}
    plain.setdefault("max_position_embeddings", 4096)
    model_type = str(values.get("model_type"))
    if model_type in FAMILIES:
        return Facts.of(plain), True
    if model_type in PLANNED:
        return Facts(PLANNED[model_type], plain), True
    experts = _first(values, *_EXPERT_COUNTS) or 0
    family = Family(
        model_type=model_type,
        architecture="",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        gated=values.get("hidden_act", "silu") in ("silu", "swish"),  # others have had no gate, Gemma's aside
        windows="pattern" if values.get("layer_types") else "all" if values.get("sliding_window") else "never",
        window_flag="use_sliding_window" if "use_sliding_window" in values else None,
        experts=_experts() if experts > 1 else None,
    )
    return Facts(family, plain), False


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _first(values: Mapping[str, Any], *keys: str) -> int | None:
    return next((values[key] for key in keys if isinstance(values.get(key), int)), None)


def _layers(facts: Facts, hidden: int, heads: int) -> tuple[Layer, ...]:
    values = facts.values
    head_dim = facts.size("head_dim", hidden // heads)
    attention = (
        _latent(facts, hidden, heads) if values.get("kv_lora_rank") else _grouped(facts, hidden, heads, head_dim)
    )
    windows = [kind.window for kind in facts.kinds(head_dim)]
    chunk = values.get("attention_chunk_size")
    if isinstance(chunk, int):  # Llama 4: every n-th layer sees everything
        every = values.get("no_rope_layer_interval", 4)
        windows = [chunk if (index + 1) % every else None for index in range(len(windows))]
    norms = sum(
        name is not None
        for name in (
            facts.family.attn_norm,
            facts.family.mlp_norm,
            facts.family.post_attn_norm,
            facts.family.post_mlp_norm,
        )
    )
    built: dict[tuple[bool, int | None], Layer] = {}
    layers = []
    for index, window in enumerate(windows):
        mixed = _is_mixed(facts, index)
        if (mixed, window) not in built:
            linears, plain = _mixture(facts, hidden) if mixed else _mlp(facts, hidden)
            built[mixed, window] = replace(
                attention,
                linears=attention.linears + linears,
                plain=attention.plain + plain + norms * _norm(facts, hidden),
                window=window,
            )
        layers.append(built[mixed, window])
    return tuple(layers)


def _grouped(facts: Facts, hidden: int, heads: int, head_dim: int) -> Layer:
    """Multi-head, grouped-query and multi-query attention."""
    family, biases = facts.family, facts.biases()
    kv_heads = 1 if family.multi_query else facts.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise LlmoptError(f"{heads} attention heads are not a multiple of {kv_heads} KV heads")
    linears = (
        Linear(rows=heads * head_dim, columns=hidden, parts=heads),
        Linear(rows=2 * kv_heads * head_dim, columns=hidden, parts=kv_heads),
        Linear(rows=hidden, columns=heads * head_dim, parts=heads),
    )
    plain = 2 * head_dim if family.qk_norm and facts.get("use_qk_norm", True) else 0
    plain += (heads + 2 * kv_heads) * head_dim if family.qkv[0] in biases else 0
    plain += hidden if family.o in biases else 0
    plain += heads if family.model_type == "gpt_oss" else 0  # its attention sinks
    pair = 4 * heads * head_dim
    return Layer(
        linears=linears,
        plain=plain,
        cached=2 * kv_heads * head_dim,
        cache_parts=kv_heads,
        pair_flops=pair,
        decode_pair_flops=pair,
    )


def _latent(facts: Facts, hidden: int, heads: int) -> Layer:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the cache holds the latent and one rotary key.

    While decoding, the queries are taken into the latent's space, so that keys and values are never made of it.
    """
    latent, rope, nope, value = (
        facts.size(key) for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    rank = facts.get("q_lora_rank")
    queries = heads * (nope + rope)
    linears = [
        Linear(rows=latent + rope, columns=hidden, parts=None),
        Linear(rows=heads * (nope + value), columns=latent, parts=heads),
        Linear(rows=hidden, columns=heads * value, parts=heads),
    ]
    if rank is None:
        linears.append(Linear(rows=queries, columns=hidden, parts=heads))
    else:
        linears += [Linear(rows=rank, columns=hidden, parts=None), Linear(rows=queries, columns=rank, parts=heads)]
    return Layer(
        linears=tuple(linears),
        plain=latent + (rank or 0),
        cached=latent + rope,
        cache_parts=1,
        pair_flops=2 * heads * (nope + rope + value),
        decode_pair_flops=2 * heads * (2 * latent + rope),
    )


def _is_mixed(facts: Facts, index: int) -> bool:
    """Whether a layer has experts: the keys by which Qwen, DeepSeek and Llama 4 say it."""
    if facts.family.experts is None or index in facts.get("mlp_only_layers", ()):
        return False
    if isinstance(named := facts.get("moe_layers"), list):
        return index in named
    if index < (facts.get("first_k_dense_replace") or 0):
        return False
    freq = facts.get("moe_layer_freq", 1)
    if isinstance(freq, list):
        return bool(freq[index])
    every = _first(facts.values, "decoder_sparse_step", "interleave_moe_layer_step") or 1
    return (index + 1) % every == 0 and index % freq == 0


def _mlp(facts: Facts, hidden: int) -> tuple[tuple[Linear, ...], int]:
    """The linears and the plain parameters of a dense MLP."""
    family, biases = facts.family, facts.biases()
    key = "intermediate_size_mlp" if facts.get("intermediate_size_mlp") else "intermediate_size"
    width = facts.size(key, family.mlp_ratio and family.mlp_ratio * hidden)
    up = (2 if family.gated else 1) * width
    plain = (up if family.up[0] in biases else 0) + (hidden if family.down in biases else 0)
    return (Linear(rows=up, columns=hidden), Linear(rows=hidden, columns=width)), plain


def _mixture(facts: Facts, hidden: int) -> tuple[tuple[Linear, ...], int]:
    """The same of a mixture of experts, with the experts that every token passes, and the router."""
    family, values = facts.family, facts.values
    assert family.experts is not None
    count = _first(values, *_EXPERT_COUNTS) or facts.size("num_local_experts")
    active = _first(values, "num_experts_per_tok", "num_experts_per_token") or facts.size("num_experts_per_tok")
    width = facts.size(family.experts.width, facts.get("intermediate_size"))
    if active > count:
        raise LlmoptError(f"a token cannot go to {active} of {count} experts")
    linears = [
        Linear(rows=2 * width, columns=hidden, count=count, active=active),
        Linear(rows=hidden, columns=width, count=count, active=active),
    ]
    shared = facts.get("shared_expert_intermediate_size") or (facts.get("n_shared_experts") or 0) * width
    shared = width if family.model_type == "llama4_text" else shared
    if shared:
        linears += [Linear(rows=2 * shared, columns=hidden), Linear(rows=hidden, columns=shared)]
    plain = count * hidden  # the router
    if family.model_type == "qwen2_moe":
        plain += hidden  # the shared expert's gate
    if values.get("topk_method") == "noaux_tc" or family.model_type in ("deepseek_v3", "kimi_k2", "glm4_moe"):
        plain += count  # corrects the scores
    if family.model_type == "gpt_oss":
        plain += count * (1 + 2 * width + hidden)  # biases of the router and the experts
    return tuple(linears), plain


def _norm(facts: Facts, hidden: int) -> int:
    return hidden * (2 if facts.family.norm == "layer" else 1)


def _checked(shape: ModelShape, checkpoint: Checkpoint) -> ModelShape:
    """Beside the tensors: how much they take, whether the head is there, and a note where the counts disagree."""
    tensors = checkpoint.tensors.values()
    stored = sum(info.size for info in tensors)
    shape = replace(shape, stored_bytes=stored)
    if shape.quantization is not None:
        return shape
    found = sum(_elements(info.shape) for info in tensors)
    if shape.head is not None and shape.parameters - shape.head.parameters == found:
        return replace(shape, head=None)
    if found != shape.parameters:
        note = f"config.json means {shape.parameters:,} parameters, and the tensors hold {found:,}"
        shape = replace(shape, notes=(*shape.notes, note))
    return shape


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
