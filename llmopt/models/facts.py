"""config.json read through a family's row: what the row calls things, and what holds where config.json is silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmopt.errors import LlmoptError, nearest
from llmopt.models.families import FAMILIES, Experts, Family
from llmopt.models.rope import Rope


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """What differs from block to block. `window` is in tokens, None where attention sees everything; `rope` is None
    where positions are learned; `experts`: a mixture stands in place of the MLP.
    """

    window: int | None
    rope: Rope | None
    experts: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Sizes of a mixture of experts; a token goes to `per_token` of `count` experts of inner size `width`."""

    names: Experts
    count: int
    per_token: int
    width: int
    normalized: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """config.json through a family's row: its own names for things, and what holds where it is silent."""

    family: Family
    values: Mapping[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Facts:
        """Find the row of the model type, with the variants that apply; LlmoptError for what is not supported."""
        model_type = values.get("model_type")
        family = FAMILIES.get(str(model_type))
        if family is None:
            own = "its own code (`auto_map`) is never run, whoever trusts it; " if values.get("auto_map") else ""
            raise LlmoptError(
                f"the model type `{model_type}` is not supported", hint=own + nearest(str(model_type), FAMILIES)
            )
        for key, allowed in family.requires.items():
            if key in values and values[key] not in allowed:
                raise _unsupported(family, key, values[key], allowed)
        for key, other in family.same.items():
            if values.get(key) not in (None, values.get(other)):
                raise _unsupported(family, key, values[key], (values.get(other),))
        known = {**family.defaults, **values}
        for variant in family.variants:
            if all(known.get(key) == value for key, value in variant.when.items()):
                family = replace(family, **variant.facts)
        return cls(family, values)

    def raw(self, key: str) -> Any:
        """The value of a key by Llama's name; the row's default only where the key is missing, so null is None."""
        name = self.name(key)
        return self.values[name] if name in self.values else self.family.defaults.get(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The same with null as if missing."""
        value = self.raw(key)
        value = self.family.defaults.get(key) if value is None else value
        return default if value is None else value

    def name(self, key: str) -> str:
        """What this config.json calls a key: the family's name for it where it has that, else Llama's."""
        own = self.family.keys.get(key, key)
        return key if key in self.values and own not in self.values else own

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LlmoptError(f"config.json needs `{self.name(key)}` as a positive whole number, not `{value}`")
        return value

    def flag(self, fact: bool | str) -> bool:
        return bool(self.get(fact, False)) if isinstance(fact, str) else fact

    def activation(self) -> str:
        value, allowed = self.get("hidden_act", "silu"), self.family.activations
        if value not in allowed:
            raise _unsupported(self.family, self.name("hidden_act"), value, allowed)
        return str(value)

    def biases(self) -> frozenset[str]:
        family = self.family
        facts = {family.o: family.o_bias, family.down: family.mlp_bias}
        facts |= dict.fromkeys(family.qkv, family.qkv_bias) | dict.fromkeys(family.up, family.mlp_bias)
        return frozenset(name for name, fact in facts.items() if self.flag(fact))

    def mixture(self) -> Mixture | None:
        experts = self.family.experts
        if experts is None:
            return None
        mixture = Mixture(
            names=experts,
            count=self.size("num_local_experts"),
            per_token=self.size("num_experts_per_tok"),
            width=self.size(experts.width),
            normalized=self.flag(experts.normalized),
        )
        if mixture.per_token > mixture.count:
            raise LlmoptError(f"a token cannot go to {mixture.per_token} of {mixture.count} experts")
        return mixture

    def kinds(self, head_dim: int) -> tuple[LayerKind, ...]:
        ropes: dict[bool, Rope | None] = {}
        for local in (False, True):
            rope = ropes[local] = self._rope(local)
            if rope is not None:
                rope.check(head_dim)
        without, every = self.get("mlp_only_layers", ()), self.size("decoder_sparse_step", 1)
        return tuple(
            LayerKind(
                window=window,
                rope=ropes[window is not None],
                experts=self.family.experts is not None and index not in without and (index + 1) % every == 0,
            )
            for index, window in enumerate(self._windows())
        )

    def _windows(self) -> list[int | None]:
        """How far each layer looks back, in tokens."""
        layers, window, rule = self.size("num_hidden_layers"), self.get("sliding_window"), self.family.windows
        flag = self.family.window_flag
        if rule == "never" or not isinstance(window, int) or (flag is not None and not self.flag(flag)):
            return [None] * layers
        if rule == "all":
            return [window] * layers
        types = self.get("layer_types")
        if types is None and rule == "from":
            first = int(self.get("max_window_layers"))
            types = ["full_attention"] * first + ["sliding_attention"] * layers
        elif types is None:
            every = self.size("sliding_window_pattern")
            types = ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(layers)]
        if len(types) < layers or not set(types) <= {"full_attention", "sliding_attention"}:
            raise LlmoptError(
                f"`layer_types` must say `full_attention` or `sliding_attention` for each of {layers} layers"
            )
        return [window if kind == "sliding_attention" else None for kind in types[:layers]]

    def _rope(self, local: bool) -> Rope | None:
        """The rotary embedding of the layers with a window (local) or of the others."""
        family = self.family
        if family.positions is not None:
            return None
        section = self.get("rope_parameters") or self.get("rope_scaling") or {}
        theta = self.get("rope_theta", 10000.0)
        kind = "sliding_attention" if local else "full_attention"
        if family.local_rope and kind in section:
            section = section[kind] or {}
        elif family.local_rope and local:
            section = {}
        if family.local_rope and local:
            theta = self.get("rope_local_base_freq")
        original = self.get("original_max_position_embeddings")
        if original is not None:
            section = {**section, "original_max_position_embeddings": original}
        rope = Rope.from_config(
            section,
            theta=theta,
            share=self.get("partial_rotary_factor", 1.0),
            max_positions=self.size("max_position_embeddings"),
        )
        if rope.type not in family.rope_types:
            raise LlmoptError(
                f"the rope type `{rope.type}` is not supported for the model type `{family.model_type}`",
                hint="supported: " + ", ".join(f"`{t}`" for t in family.rope_types),
            )
        if rope.share != 1.0 and not family.partial_rotary:
            raise LlmoptError(
                "a partial rotary embedding (`partial_rotary_factor`) is not supported "
                f"for the model type `{family.model_type}`"
            )
        return rope


def _unsupported(family: Family, key: str, value: object, allowed: tuple[object, ...]) -> LlmoptError:
    return LlmoptError(
        f"`{key}: {value}` is not supported for the model type `{family.model_type}`",
        hint="supported: " + ", ".join(f"`{v}`" for v in allowed),
    )
