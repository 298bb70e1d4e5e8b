"""config.json of TensorRT-LLM's unified checkpoint: all that decides which tensors each rank has.

Source: docs/source/architecture/checkpoint.md and models/modeling_utils.py of TensorRT-LLM; the fields and their order
are those of ModelOpt 0.47's exporter (torch/export/tensorrt_llm_utils.py). It differs in this: `rotary_base`,
`rotary_scaling` and what a family's class reads beyond (`attn_bias`, `qwen_type`, ...) are always here, since the
loader takes its own default for whatever is missing, where ModelOpt without TensorRT-LLM beside it leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmopt.compilers.trt_llm.families import (
    ALGORITHMS,
    AWQ,
    BY_ARCHITECTURE,
    INPUT_NORM,
    MLP_NORM,
    POST_NORM,
    EngineFamily,
)
from llmopt.compilers.trt_llm.sources import (
    find_algorithm,
    find_dtype,
    find_family,
    find_kv_cache,
    find_norms,
    find_scaling,
    find_schemes,
)
from llmopt.errors import LlmoptError, SettingsError, nearest
from llmopt.formats.scheme import KVCache

if TYPE_CHECKING:
    from llmopt.compilers.trt_llm.settings import Settings
    from llmopt.formats.reading import Source

_PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # whose layout it is
_DTYPES = {"float16": "F16", "bfloat16": "BF16"}
_KV_CACHES: Mapping[KVCache, str | None] = {"none": None, "fp8": "FP8", "int8": "INT8"}
_SEQ_LENGTH = 8192  # QWenConfig's own; only the first Qwen used it
HEAD, EMBEDDING, FINAL_NORM = "lm_head", "transformer.vocab_embedding", "transformer.ln_f"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """One model, quantization and mapping. Sizes are of the whole model, not of a rank.

    norms: of a block, by TensorRT-LLM's names. algorithm: `quant_algo`, None where nothing is quantized; group_size:
    AWQ's, else 0. plain: modules of blocks that stay as they are ("transformer.layers.0.mlp.fc"); only where the
    pipeline has one stage, since each stage counts its layers from 0.
    """

    architecture: str
    dtype: str  # "float16" or "bfloat16", of what is not quantized
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    activation: str
    norms: tuple[str, ...]
    qkv_bias: bool
    dense_bias: bool
    mlp_bias: bool
    rotary_base: float
    rotary_pct: float
    rotary_scaling: Mapping[str, float | int | str] | None
    algorithm: str | None
    group_size: int
    kv_cache: KVCache
    plain: tuple[str, ...]
    tensor_parallel: int
    pipeline_parallel: int

    @classmethod
    def of(cls, source: Source, settings: Settings) -> EngineConfig:
        """From the headers of a checkpoint. SettingsError or LlmoptError for what engine mode does not have."""
        model, family = source.config, find_family(source.config, settings)
        rope = model.rope
        assert rope is not None  # every family of the table turns its queries and keys
        schemes = find_schemes(source)
        algorithm, group_size = find_algorithm(family, schemes)
        config = cls(
            architecture=family.architecture,
            dtype=find_dtype(model, settings),
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_size=model.head_dim,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            vocab_size=model.vocab_size,
            max_positions=model.max_positions,
            norm_epsilon=model.norm_eps,
            activation=model.activation,
            norms=find_norms(model, family),
            qkv_bias=model.family.qkv[0] in model.biases,
            dense_bias=model.family.o in model.biases,
            mlp_bias=model.family.down in model.biases,
            rotary_base=rope.theta,
            rotary_pct=rope.share,
            rotary_scaling=find_scaling(rope),
            algorithm=algorithm,
            group_size=group_size,
            kv_cache=find_kv_cache(source, settings),
            plain=() if algorithm is None else tuple(name for name, scheme in schemes.items() if scheme is None),
            tensor_parallel=settings.tensor_parallel,
            pipeline_parallel=settings.pipeline_parallel,
        )
        config.check()
        return config

    @classmethod
    def parse(cls, json: Mapping[str, Any]) -> EngineConfig:
        """The inverse of `to_json`. LlmoptError for a field that is missing, unknown, or not what the others imply.

        ModelOpt's own files pass too: of the fields that it leaves out the loader's defaults hold.
        """
        fields = _Fields(json)
        family = BY_ARCHITECTURE.get(fields.text("architecture"))
        if family is None:
            raise LlmoptError(
                f"config.json names the architecture `{json['architecture']}`, which is not supported",
                hint=nearest(str(json["architecture"]), BY_ARCHITECTURE),
            )
        mapping, quantization = fields.section("mapping"), fields.section("quantization")
        algorithm, kv_cache = _said_algorithm(quantization)
        excluded = [str(name) for name in quantization.get("exclude_modules") or ()]
        scaling, bias = json.get("rotary_scaling"), fields.flag("bias")
        config = cls(
            architecture=family.architecture,
            dtype=fields.text("dtype"),
            layers=fields.size("num_hidden_layers"),
            heads=fields.size("num_attention_heads"),
            kv_heads=fields.size("num_key_value_heads"),
            head_size=fields.size("head_size"),
            hidden_size=fields.size("hidden_size"),
            intermediate_size=fields.size("intermediate_size"),
            vocab_size=fields.size("vocab_size"),
            max_positions=fields.size("max_position_embeddings"),
            norm_epsilon=fields.number("norm_epsilon"),
            activation=fields.text("hidden_act"),
            norms=_said_norms(family, json),
            qkv_bias=bool(json.get("attn_bias", True if family.model_type == "qwen2" else bias)),
            dense_bias=bias,
            mlp_bias=bool(json.get("mlp_bias", bias and not family.rms)),
            rotary_base=fields.number("rotary_base", 10000.0),
            rotary_pct=fields.number("rotary_pct", 1.0),
            rotary_scaling=None if scaling is None else dict(scaling),
            algorithm=algorithm,
            group_size=_Fields(quantization, "quantization.").size("group_size") if algorithm == AWQ else 0,
            kv_cache=kv_cache,
            plain=tuple(name for name in excluded if name != HEAD),
            tensor_parallel=_Fields(mapping, "mapping.").size("tp_size"),
            pipeline_parallel=_Fields(mapping, "mapping.").size("pp_size"),
        )
        config._compare(json)
        config.check()
        return config

    @property
    def family(self) -> EngineFamily:
        return BY_ARCHITECTURE[self.architecture]

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def stored_dtype(self) -> str:
        """`dtype` as safetensors names it."""
        return _DTYPES[self.dtype]

    @property
    def vocab_size_padded(self) -> int:
        """Rows of the embedding and the head: the last rank's are filled up with zeros. The loader's rule."""
        return -(-self.vocab_size // self.tensor_parallel) * self.tensor_parallel

    @property
    def kv_heads_of_rank(self) -> int:
        """Where there are fewer heads than ranks, each is on several."""
        return max(self.kv_heads // self.tensor_parallel, 1)

    def layers_of_rank(self, rank: int) -> range:
        """The blocks of a rank; it counts its own from 0."""
        each, stage = self.layers // self.pipeline_parallel, rank // self.tensor_parallel
        return range(stage * each, (stage + 1) * each)

    def is_first_stage(self, rank: int) -> bool:
        return rank < self.tensor_parallel

    def is_last_stage(self, rank: int) -> bool:
        return rank >= self.ranks - self.tensor_parallel

    def to_json(self) -> dict[str, Any]:
        """config.json, in ModelOpt's order."""
        scaling = {} if self.rotary_scaling is None else {"rotary_scaling": dict(self.rotary_scaling)}
        return {
            "producer": dict(_PRODUCER),
            "architecture": self.architecture,
            "dtype": self.dtype,
            "logits_dtype": "float16",
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_size": self.hidden_size,
            "norm_epsilon": self.norm_epsilon,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "hidden_act": self.activation,
            "use_parallel_embedding": True,
            "embedding_sharding_dim": 0,
            "head_size": self.head_size,
            "intermediate_size": self.intermediate_size,
            "position_embedding_type": "rope_gpt_neox",
            "share_embedding_table": False,
            "residual_mlp": False,
            "bias": self.dense_bias,
            "rotary_pct": self.rotary_pct,
            "rank": self.ranks - 1,
            "decoder": self.family.decoder,
            "rmsnorm": self.family.rms,
            "lm_head_bias": False,
            "rotary_base": self.rotary_base,
            **scaling,
            "mapping": {
                "world_size": self.ranks,
                "tp_size": self.tensor_parallel,
                "pp_size": self.pipeline_parallel,
            },
            "quantization": self._quantization(),
            **self._of_family(),
        }

    def check(self) -> None:
        """SettingsError for what cannot be split over the ranks, or what no kernel holds."""
        tp, pp = self.tensor_parallel, self.pipeline_parallel
        for what, count in (("attention heads", self.heads), ("inner features of the MLP", self.intermediate_size)):
            if count % tp:
                raise SettingsError(
                    f"{tp} tensor-parallel ranks do not divide {count} {what}",
                    hint=f"`tensor_parallel` must divide them: {_divisors(self)}",
                )
        if self.kv_heads % tp and tp % self.kv_heads:
            raise SettingsError(
                f"{self.kv_heads} KV heads can be neither split over nor copied to {tp} tensor-parallel ranks",
                hint=f"one must be a multiple of the other: `tensor_parallel` {_divisors(self)}",
            )
        if self.layers % pp:
            raise SettingsError(
                f"{pp} pipeline stages do not divide {self.layers} layers",
                hint="`pipeline_parallel` must divide the layers",
            )
        if pp > 1 and not self.family.pipeline:
            raise SettingsError(
                f"TensorRT-LLM's `{self.architecture}` has no pipeline stages", hint="use `tensor_parallel` instead"
            )
        if pp > 1 and self.plain:
            raise SettingsError(
                f"`{self.plain[0]}` is not quantized, which a pipeline of {pp} stages cannot be told",
                hint="each stage counts its layers from 0: use `tensor_parallel`, or quantize every linear",
            )
        if self.architecture == "FalconForCausalLM" and self.dense_bias and tp > 1 and POST_NORM not in self.norms:
            raise SettingsError(f"TensorRT-LLM would add Falcon's biases {tp} times", hint="set `tensor_parallel` to 1")
        if self.algorithm == AWQ:
            self._check_groups()

    def _check_groups(self) -> None:
        """WeightOnlyGroupwiseQuantLinear asks for padded shapes where a rank's part is not whole groups each way."""
        step = self.group_size * self.tensor_parallel
        attention = self.heads * self.head_size
        keys = 2 * max(self.kv_heads, self.tensor_parallel) * self.head_size
        sizes = {
            "hidden size": self.hidden_size,
            "width of the heads": attention,
            "width of q, k and v": attention + keys,
            "inner size of the MLP": self.intermediate_size,
        }
        for what, size in sizes.items():
            if size % step:
                ranks = "" if self.tensor_parallel == 1 else f" on {self.tensor_parallel} ranks"
                raise SettingsError(
                    f"the {what}, {size}, is no multiple of {step}: groups of {self.group_size}{ranks}",
                    hint="use fewer tensor-parallel ranks, or quantize in groups of 64",
                )

    def _quantization(self) -> dict[str, Any]:
        said: dict[str, Any] = {"quant_algo": self.algorithm, "kv_cache_quant_algo": _KV_CACHES[self.kv_cache]}
        if self.algorithm is None:
            return said
        if self.algorithm == AWQ:
            said |= {"group_size": self.group_size, "has_zero_point": False, "pre_quant_scale": True}
        return said | {"exclude_modules": [HEAD, *self.plain]}

    def _of_family(self) -> dict[str, Any]:
        """What the class of the architecture reads beyond, and ModelOpt does not write."""
        match self.family.decoder:
            case "llama":
                return {"attn_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}
            case "qwen":
                kind = {"qwen_type": self.family.model_type, "seq_length": _SEQ_LENGTH}
                return {"attn_bias": self.qkv_bias, "mlp_bias": self.mlp_bias, **kind}
            case "falcon":
                # The new architecture with one norm (Falcon 2) is the old one: q, k and v are in one order here.
                new = MLP_NORM in self.norms
                return {
                    "parallel_attention": POST_NORM not in self.norms,
                    "new_decoder_architecture": new,
                    "num_ln_in_parallel_attn": 2 if new else None,
                }
        return {"rotary_emb_base": self.rotary_base}

    def _compare(self, json: Mapping[str, Any]) -> None:
        """Raise unless `json` says what `to_json` says, in every field that it has."""
        own = self.to_json()
        for key, value in json.items():
            if key not in own:
                raise LlmoptError(f"config.json has an unknown field `{key}`", hint=nearest(key, own))
            if key == "rank" and value in range(self.ranks):
                continue
            if key == "producer":
                continue
            if value != own[key]:
                raise LlmoptError(
                    f"config.json says `{key}: {value}` where its other fields imply `{own[key]}`",
                    hint="prepare the checkpoint again; it is not meant to be edited",
                )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Fields of a JSON object that must be there and of a kind."""

    values: Mapping[str, Any]
    prefix: str = ""

    def size(self, key: str) -> int:
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, "a positive whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._wrong(key, "a positive number", value)
        return value

    def text(self, key: str) -> str:
        value = self._value(key)
        if key == "dtype" and value not in _DTYPES:
            raise self._wrong(key, " or ".join(f"`{name}`" for name in _DTYPES), value)
        if not isinstance(value, str):
            raise self._wrong(key, "a text", value)
        return value

    def flag(self, key: str) -> bool:
        value = self._value(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        value = self._value(key)
        if not isinstance(value, Mapping):
            raise self._wrong(key, "an object", value)
        return value

    def _value(self, key: str, default: object = None) -> Any:
        if key not in self.values and default is None:
            raise LlmoptError(
                f"config.json has no field `{self.prefix}{key}`", hint="is it of a TensorRT-LLM checkpoint?"
            )
        return self.values.get(key, default)

    def _wrong(self, key: str, expected: str, value: object) -> LlmoptError:
        return LlmoptError(f"config.json must say {expected} for `{self.prefix}{key}`, not `{value}`")


def _said_norms(family: EngineFamily, json: Mapping[str, Any]) -> tuple[str, ...]:
    if family.decoder != "falcon":
        return family.norms
    fields = _Fields(json)
    if fields.flag("new_decoder_architecture"):
        return (INPUT_NORM, MLP_NORM)
    return (INPUT_NORM,) if fields.flag("parallel_attention") else (INPUT_NORM, POST_NORM)


def _said_algorithm(quantization: Mapping[str, Any]) -> tuple[str | None, KVCache]:
    algorithm, cache = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise LlmoptError(
            f"config.json names the algorithm `{algorithm}`, which is not supported",
            hint=nearest(str(algorithm), ALGORITHMS),
        )
    kv_cache = next((name for name, said in _KV_CACHES.items() if said == cache), None)
    if kv_cache is None:
        raise LlmoptError(
            f"config.json names the KV cache `{cache}`, which is not supported", hint="`FP8` and `INT8` are"
        )
    return algorithm, kv_cache


def _divisors(config: EngineConfig) -> str:
    """The tensor-parallel sizes that a model can be split over, for a hint."""
    fit = [
        count
        for count in range(1, config.heads + 1)
        if config.heads % count == 0
        and config.intermediate_size % count == 0
        and (config.kv_heads % count == 0 or count % config.kv_heads == 0)
    ]
    return ", ".join(str(count) for count in fit[:-1]) + (" or " if fit[1:] else "") + str(fit[-1])
