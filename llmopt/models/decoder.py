"""The decoder's forward pass in torch, cut at the places where linears read their input.

A block is walked site by site (`DecoderBlock.enter`), so that a quantizer can look at a site's input and replace the
site's weights before their outputs are computed. What a family does is read from its row; nothing here names one.
Shape suffixes: B windows, T tokens, H hidden, N heads, D head channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from llmopt.models import mixture
from llmopt.models.checkpoint import Checkpoint, bfloat16_to_float32
from llmopt.models.config import DecoderConfig
from llmopt.models.families import K_NORM, Q_NORM, Site
from llmopt.models.rope import Rope, inv_freq

#: What a linear's input passes through first: int8 rounding where activations are quantized.
InputTransform: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class State:
    """One batch on its way through a block: the residual stream, and the input of the site last entered.

    kept: what later sites need beside. A tensor that a step does not change is handed on as the same object.
    """

    residual_BTH: torch.Tensor
    site_input: torch.Tensor
    kept: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PositionTables:
    """What the attention of any block needs to know of positions 0 to T - 1.

    rotary: cos and sin, float32 [T, channels that turn]. masks: by window, bool [T, T], where a token (row) may look;
    None where that is every token before it and itself.
    """

    rotary: Mapping[Rope, tuple[torch.Tensor, torch.Tensor]]
    masks: Mapping[int | None, torch.Tensor | None]


def position_tables(config: DecoderConfig, tokens: int) -> PositionTables:
    """The tables for windows of `tokens`."""
    ropes = {kind.rope for kind in config.kinds if kind.rope is not None}
    masks: dict[int | None, torch.Tensor | None] = {}
    for window in {kind.window for kind in config.kinds}:
        narrow = window is not None and window < tokens
        masks[window] = torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - window) if narrow else None  # type: ignore[operator]
    return PositionTables({rope: _rotary(rope, config.head_dim, tokens) for rope in ropes}, masks)


def _rotary(rope: Rope, head_dim: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles_TD = torch.outer(torch.arange(tokens).float(), torch.from_numpy(inv_freq(rope, head_dim, tokens)))
    angles_TD = torch.cat((angles_TD, angles_TD), dim=-1)
    return angles_TD.cos() * rope.magnitude, angles_TD.sin() * rope.magnitude


@dataclass
class DecoderBlock:
    """One decoder block over its tensors, by their names within the block, which may be replaced on the way.

    Pure but for that: all that a walk has found lies in its State. With `watch_kv`, states from the site after
    attention on keep `kv_peak`: the largest |k| as it would be cached, and the largest |v|.
    """

    config: DecoderConfig
    index: int
    tensors: dict[str, torch.Tensor]
    input_transform: dict[str, InputTransform] = field(default_factory=dict)
    watch_kv: bool = False
    half: bool = False  # linears multiply in BF16, as the models are served; everything else stays float32

    def enter(self, site: Site, state: State, tables: PositionTables) -> State:
        """Compute up to the input of `site`'s linears; sites come in the order of `config.sites(index)`."""
        if site.role == "qkv":
            return State(state.residual_BTH, self._norm(self.config.family.attn_norm, state.residual_BTH))
        if site.role == "o":
            return self._attend(state, tables)
        if site.role == "up":
            return self._enter_mlp(state) if site.expert is None else self._enter_expert(state, site.expert)
        return self._activate(state, site.expert)

    def leave(self, state: State) -> torch.Tensor:
        """The block's output, from the state at its last site."""
        config, family = self.config, self.config.family
        if config.mixture is not None and config.kinds[self.index].experts:
            kept = self._with_output(state, config.mixture.count - 1)
            y_BTH = mixture.combined(kept).view(state.residual_BTH.shape)
        else:
            y_BTH = self.linear(family.down, state.site_input)
        return state.residual_BTH + self._post(family.post_mlp_norm, y_BTH)

    def forward(self, x_BTH: torch.Tensor, tables: PositionTables) -> torch.Tensor:
        """The whole block at once."""
        state = State(x_BTH, x_BTH)
        for site in self.config.sites(self.index):
            state = self.enter(site, state, tables)
        return self.leave(state)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name in self.input_transform:
            x = self.input_transform[name](x)
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if not self.half:
            return F.linear(x, weight, bias)
        y = F.linear(x.bfloat16(), weight.bfloat16()).float()
        return y if bias is None else y.add_(bias)

    def _attend(self, state: State, tables: PositionTables) -> State:
        """Causal self-attention up to the input of the output projection."""
        config, kind = self.config, self.config.kinds[self.index]
        q, k, v = self._qkv(state.site_input)
        if config.family.qk_norm:
            q, k = self._norm(Q_NORM, q), self._norm(K_NORM, k)
        if kind.rope is not None:
            cos_TD, sin_TD = (table.to(q.dtype) for table in tables.rotary[kind.rope])
            q, k = _rotate(q, cos_TD, sin_TD), _rotate(k, cos_TD, sin_TD)
        kept = {"normed": state.site_input} if config.family.mlp_norm is None else {}
        if self.watch_kv:
            kept["kv_peak"] = torch.stack((k.detach().abs().max(), v.detach().abs().max()))
        if config.attention_cap is not None:
            out = _capped_attention(q, k, v, tables.masks[kind.window], config.query_scale, config.attention_cap)
        else:
            mask = tables.masks[kind.window]
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=config.query_scale,
                enable_gqa=config.heads != config.kv_heads,
            )
        return State(state.residual_BTH, out.transpose(1, 2).flatten(2), kept)

    def _qkv(self, h_BTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, N, T, D], and keys and values [B, KV heads, T, D], out of the family's layout."""
        config, family = self.config, self.config.family
        heads, kv_heads, shape = config.heads, config.kv_heads, h_BTH.shape[:2]
        if family.qkv_layout == "grouped":
            fused = self.linear(family.qkv[0], h_BTH).view(*shape, kv_heads, heads // kv_heads + 2, config.head_dim)
            parts = [fused[:, :, :, :-2].flatten(2, 3), fused[:, :, :, -2], fused[:, :, :, -1]]
        elif family.qkv_layout == "stacked":
            fused = self.linear(family.qkv[0], h_BTH).view(*shape, heads + 2 * kv_heads, config.head_dim)
            parts = list(torch.split(fused, [heads, kv_heads, kv_heads], dim=2))
        else:
            parts = [self.linear(name, h_BTH).view(*shape, -1, config.head_dim) for name in family.qkv]
        q, k, v = (part.transpose(1, 2) for part in parts)
        return q, k, v

    def _after_attention(self, state: State) -> torch.Tensor:
        """The residual stream with attention's output, from the state at the output projection."""
        y_BTH = self.linear(self.config.family.o, state.site_input)
        return state.residual_BTH + self._post(self.config.family.post_attn_norm, y_BTH)

    def _enter_mlp(self, state: State) -> State:
        """From the output projection to the input of the MLP, or of its experts."""
        family, residual_BTH = self.config.family, self._after_attention(state)
        assert family.mlp_norm is not None
        normed_BTH = self._norm(family.mlp_norm, state.residual_BTH if self.config.parallel else residual_BTH)
        return State(residual_BTH, normed_BTH, state.kept)

    def _enter_expert(self, state: State, expert: int) -> State:
        """The tokens that the router sends to this expert; the first one's turn is also the router's."""
        experts = self.config.mixture
        assert experts is not None
        if expert:
            kept = self._with_output(state, expert - 1)
        else:
            state = self._enter_mlp(state)
            router_EH = self.tensors[f"{experts.names.router}.weight"]
            routes = mixture.route(
                state.site_input.flatten(0, 1),
                router_EH,
                per_token=experts.per_token,
                normalized=experts.normalized,
            )
            kept = {**state.kept, **routes}
        return State(state.residual_BTH, mixture.inputs(kept, expert), kept)

    def _with_output(self, state: State, expert: int) -> dict[str, torch.Tensor]:
        """What is kept at the expert's down projection, and its output."""
        assert self.config.mixture is not None
        down = self.config.mixture.names.down.format(expert)
        return mixture.add(state.kept, expert, self.linear(down, state.site_input))

    def _activate(self, state: State, expert: int | None) -> State:
        """Up to the input of the down projection, of the MLP or of an expert."""
        family, h, residual_BTH, kept = self.config.family, state.site_input, state.residual_BTH, state.kept
        names = family.up
        if expert is not None:
            assert self.config.mixture is not None
            names = tuple(
                name.format(expert) for name in (self.config.mixture.names.gate, self.config.mixture.names.up)
            )
        elif family.mlp_norm is None:  # attention's output projection is the site before
            residual_BTH, h = self._after_attention(state), kept["normed"]
            kept = {name: tensor for name, tensor in kept.items() if name != "normed"}
        act = _ACTIVATIONS[self.config.activation]
        parts = [self.linear(name, h) for name in names]
        if family.gated and len(parts) == 1:
            parts = list(parts[0].chunk(2, dim=-1))
        return State(residual_BTH, act(parts[0]) * parts[1] if family.gated else act(parts[0]), kept)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return norm(self.config, x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _post(self, name: str | None, y: torch.Tensor) -> torch.Tensor:
        """An output through the norm that stands before it is added, where the family has one."""
        return y if name is None else self._norm(name, y)


def norm(config: DecoderConfig, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The family's norm over the last dimension: LayerNorm, or by root mean square (arXiv:1910.07467)."""
    if config.family.norm == "layer":
        return F.layer_norm(x, weight.shape, weight, bias, config.norm_eps)
    if config.family.norm_offset:
        weight = weight + config.family.norm_offset
    return F.rms_norm(x, weight.shape, weight, config.norm_eps)


def embed(checkpoint: Checkpoint, config: DecoderConfig, ids_BT: torch.Tensor) -> torch.Tensor:
    """The first block's input, float32 [B, T, H]; of the tables only the rows that are needed are read."""
    family = config.family
    x_BTH = _table_rows(checkpoint, f"{family.embedding}.weight", ids_BT.numpy())
    if family.scaled_embedding:
        x_BTH = x_BTH * config.hidden_size**0.5
    if family.positions is not None:
        rows = np.arange(ids_BT.shape[1]) + family.position_offset
        x_BTH = x_BTH + _table_rows(checkpoint, f"{family.positions}.weight", rows)
    return x_BTH


def _table_rows(checkpoint: Checkpoint, name: str, rows: np.ndarray) -> torch.Tensor:
    found = checkpoint.array(name)[rows]
    return torch.from_numpy(bfloat16_to_float32(found) if found.dtype == np.uint16 else found.astype(np.float32))


def final_norm(checkpoint: Checkpoint, config: DecoderConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm between the last block and the head."""
    tensors = {name: torch.from_numpy(checkpoint.float_array(name)) for name in config.final_shapes()}
    name = config.family.final_norm
    return lambda x: norm(config, x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def logits(hidden: torch.Tensor, head_VH: torch.Tensor, config: DecoderConfig) -> torch.Tensor:
    """[..., V] from the final norm's outputs [..., H]."""
    found = hidden @ head_VH.T
    return found if config.logits_cap is None else (found / config.logits_cap).tanh() * config.logits_cap


def _capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask_TT: torch.Tensor | None,
    scale: float | None,
    cap: float,
) -> torch.Tensor:
    """Causal attention with scores cap * tanh(score / cap), [B, N, T, D]; a KV head at a time, to save memory."""
    tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    if mask_TT is None:
        mask_TT = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    for head in range(k.shape[1]):
        scores = q[:, head * group : (head + 1) * group] @ k[:, head : head + 1].transpose(-1, -2) * scale
        scores = (scores / cap).tanh() * cap
        weights = scores.masked_fill(~mask_TT, float("-inf")).softmax(dim=-1, dtype=torch.float32)
        outs.append(weights.to(v.dtype) @ v[:, head : head + 1])
    return torch.cat(outs, dim=1)


def _rotate(x: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotate channel i with channel i + D / 2 (the layout of Hugging Face checkpoints), of the channels that turn."""
    turning = cos_TD.shape[-1]
    rest = x[..., turning:]
    x = x[..., :turning]
    first, second = x.chunk(2, dim=-1)
    x = x * cos_TD + torch.cat((-second, first), dim=-1) * sin_TD
    return x if not rest.shape[-1] else torch.cat((x, rest), dim=-1)
