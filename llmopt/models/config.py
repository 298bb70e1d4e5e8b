"""What config.json says about a decoder, checked against the family table and against every tensor's shape."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.errors import LlmoptError
from llmopt.models.checkpoint import FLOATS, Checkpoint
from llmopt.models.facts import Facts, LayerKind, Mixture
from llmopt.models.families import K_NORM, Q_NORM, Family, Fold, Rows, Site
from llmopt.models.rope import Rope


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """The sizes of a decoder-only model, and its family's row with the variants that config.json asks for.

    query_scale: what scores are multiplied by, None for one over the root of head_dim. The caps bound attention scores
    and logits softly (Gemma 2).
    """

    family: Family
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    activation: str
    parallel: bool
    kinds: tuple[LayerKind, ...]  # one a block
    mixture: Mixture | None
    query_scale: float | None
    attention_cap: float | None
    logits_cap: float | None
    tie_embeddings: bool
    max_positions: int
    biases: frozenset[str]  # linears of a block that have one
    eos_token_ids: tuple[int, ...]
    dtype: str  # of the embedding, as safetensors names it: "BF16"

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> DecoderConfig:
        """Raises LlmoptError naming the first thing that is not supported, missing or of a wrong shape.

        Of a quantized checkpoint, the linears' own tensors are checked by `llmopt.formats`.
        """
        config = cls.parse(checkpoint)
        config._check_tensors(checkpoint)
        return config

    @classmethod
    def parse(cls, checkpoint: Checkpoint) -> DecoderConfig:
        """The same without a look at the tensors but the embedding's dtype and whether there is a head."""
        facts = Facts.of(checkpoint.config)
        family = facts.family
        heads, hidden = facts.size("num_attention_heads"), facts.size("hidden_size")
        head_dim = facts.size("head_dim", hidden // heads)
        pre_attention = facts.raw("query_pre_attn_scalar")
        config = cls(
            family=family,
            hidden_size=hidden,
            layers=facts.size("num_hidden_layers"),
            heads=heads,
            kv_heads=1 if family.multi_query else facts.size("num_key_value_heads", heads),
            head_dim=head_dim,
            intermediate_size=facts.size("intermediate_size", family.mlp_ratio and family.mlp_ratio * hidden),
            vocab_size=facts.size("vocab_size"),
            norm_eps=float(facts.get("rms_norm_eps", 1e-6)),
            activation=facts.activation(),
            parallel=facts.flag(family.parallel),
            kinds=facts.kinds(head_dim),
            mixture=facts.mixture(),
            query_scale=None if pre_attention is None else float(pre_attention) ** -0.5,
            attention_cap=facts.raw("attn_logit_softcapping"),
            logits_cap=facts.raw("final_logit_softcapping"),
            tie_embeddings=facts.flag("tie_word_embeddings")
            or not any(name.startswith(f"{family.head}.") for name in checkpoint.tensors),
            max_positions=facts.size("max_position_embeddings"),
            biases=facts.biases(),
            eos_token_ids=_token_ids(facts.get("eos_token_id")),
            dtype=_embedding_dtype(checkpoint, family),
        )
        if config.heads % config.kv_heads:
            raise LlmoptError(f"{config.heads} attention heads are not a multiple of {config.kv_heads} KV heads")
        return config

    @property
    def rope(self) -> Rope | None:
        """The rotary embedding of the first block; the only one where the family has no `local_rope`."""
        return self.kinds[0].rope

    @property
    def sliding_window(self) -> int | None:
        """The shortest window of any block, in tokens; None where attention sees everything."""
        return min((kind.window for kind in self.kinds if kind.window is not None), default=None)

    def block(self, index: int) -> str:
        return self.family.block.format(index)

    def sites(self, index: int) -> tuple[Site, ...]:
        """The sites of a block in the order in which it meets them."""
        family = self.family
        shared = family.mlp_norm is None
        v_rows, up_rows = self._v_rows(), self._up_rows(self.intermediate_size)
        added = family.post_attn_norm is None
        sites = [
            Site(
                name="qkv_up" if shared else "qkv",
                role="qkv",
                linears=(*family.qkv, *family.up) if shared else family.qkv,
                scaled_by=Fold(name=family.attn_norm),
            ),
            Site(name="o", role="o", linears=(family.o,), scaled_by=Fold(name=family.qkv[-1], rows=v_rows), adds=added),
        ]
        if self.kinds[index].experts:
            return (*sites, *self._expert_sites())
        if family.mlp_norm is not None:
            up = Site(
                name="gate_up" if family.gated else "up",
                role="up",
                linears=family.up,
                scaled_by=Fold(name=family.mlp_norm),
            )
            sites.append(up)
        down = Site(
            name="down",
            role="down",
            linears=(family.down,),
            scaled_by=None if up_rows is None else Fold(name=family.up[-1], rows=up_rows),
            adds=family.post_mlp_norm is None,
        )
        return (*sites, down)

    def linear_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """(out features, in features) of every linear of a block that can be quantized, in the order of its sites."""
        family, queries, keys = self.family, self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = (queries, keys, keys) if len(family.qkv) == 3 else (queries + 2 * keys,)
        shapes = {name: (count, self.hidden_size) for name, count in zip(family.qkv, rows, strict=True)}
        shapes[family.o] = (self.hidden_size, queries)
        if not self.kinds[index].experts:
            parts = 2 if family.gated and len(family.up) == 1 else 1
            shapes |= dict.fromkeys(family.up, (parts * self.intermediate_size, self.hidden_size))
            shapes[family.down] = (self.hidden_size, self.intermediate_size)
        elif self.mixture is not None:
            names, width = self.mixture.names, self.mixture.width
            for expert in range(self.mixture.count):
                shapes |= {each.format(expert): (width, self.hidden_size) for each in (names.gate, names.up)}
                shapes[names.down.format(expert)] = (self.hidden_size, width)
        return shapes

    def plain_linears(self, index: int) -> tuple[str, ...]:
        """The linears of a block that always stay as they are: the router of a mixture."""
        return (self.mixture.names.router,) if self.mixture is not None and self.kinds[index].experts else ()

    def block_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of a plain block, by its name within the block."""
        family = self.family
        norms = (family.attn_norm, family.mlp_norm, family.post_attn_norm, family.post_mlp_norm)
        shapes: dict[str, tuple[int, ...]] = {}
        for norm in norms:
            if norm is not None:
                shapes |= self._norm_shapes(norm)
        if family.qk_norm:
            shapes |= {f"{Q_NORM}.weight": (self.head_dim,), f"{K_NORM}.weight": (self.head_dim,)}
        for name, shape in self.linear_shapes(index).items():
            shapes[f"{name}.weight"] = shape
            if name in self.biases:
                shapes[f"{name}.bias"] = shape[:1]
        for name in self.plain_linears(index):
            assert self.mixture is not None
            shapes[f"{name}.weight"] = (self.mixture.count, self.hidden_size)
        return shapes

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """What turns token ids into the first block's input: the embedding, and the learned positions if any."""
        shapes = {f"{self.family.embedding}.weight": (self.vocab_size, self.hidden_size)}
        if self.family.positions is not None:
            rows = self.max_positions + self.family.position_offset
            shapes[f"{self.family.positions}.weight"] = (rows, self.hidden_size)
        return dict(shapes)

    def final_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the norm before the head."""
        return self._norm_shapes(self.family.final_norm)

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor outside the blocks: embedding, final norm and, unless tied, the head."""
        shapes = self.embedding_shapes() | self.final_shapes()
        head: dict[str, tuple[int, ...]] = {f"{self.family.head}.weight": (self.vocab_size, self.hidden_size)}
        return shapes if self.tie_embeddings else shapes | head

    def _norm_shapes(self, norm: str) -> dict[str, tuple[int, ...]]:
        suffixes = ("weight", "bias") if self.family.norm == "layer" else ("weight",)
        return {f"{norm}.{suffix}": (self.hidden_size,) for suffix in suffixes}

    def _v_rows(self) -> Rows:
        """The rows of the (last) linear of q, k, v that make the input of the output projection."""
        head, group = self.head_dim, self.heads // self.kv_heads
        start, stride = {
            "separate": (0, head),
            "stacked": ((self.heads + self.kv_heads) * head, head),
            "grouped": ((group + 1) * head, (group + 2) * head),
        }[self.family.qkv_layout]
        return Rows(start=start, size=head, count=self.kv_heads, stride=stride, repeats=group)

    def _up_rows(self, width: int) -> Rows | None:
        """The rows of the (last) up projection that scale the input of the down projection; None where none do.

        A gate multiplies them; without a gate the activation must let a positive scale pass, as ReLU does.
        """
        if not self.family.gated:
            return Rows(size=width) if self.activation == "relu" else None
        return Rows(start=width if len(self.family.up) == 1 else 0, size=width)

    def _expert_sites(self) -> list[Site]:
        """Two each. Their common norm cannot take a scale: every expert, and the router, would want its own."""
        assert self.mixture is not None
        names, sites = self.mixture.names, []
        for expert in range(self.mixture.count):
            gate, up, down = (name.format(expert) for name in (names.gate, names.up, names.down))
            name, fold = f"experts.{expert}", Fold(name=up, rows=Rows(size=self.mixture.width))
            sites.append(Site(name=f"{name}.gate_up", role="up", linears=(gate, up), scaled_by=None, expert=expert))
            sites.append(Site(name=f"{name}.down", role="down", linears=(down,), scaled_by=fold, expert=expert))
        return sites

    def _check_tensors(self, checkpoint: Checkpoint) -> None:
        quantized = "quantization_config" in checkpoint.config
        expected: dict[str, tuple[int, ...]] = dict(self.outer_shapes())
        encoded = {f"{self.family.head}.weight"}
        for index in range(self.layers):
            expected |= {f"{self.block(index)}.{name}": shape for name, shape in self.block_shapes(index).items()}
            encoded |= {f"{self.block(index)}.{name}.weight" for name in self.linear_shapes(index)}
        for name, shape in expected.items():
            info = checkpoint.tensors.get(name)
            if quantized and name in encoded and (info is None or info.dtype not in FLOATS):
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
            if info.dtype not in FLOATS:
                raise LlmoptError(f"`{name}` has the dtype `{info.dtype}`; a plain checkpoint holds floats")


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
