"""The decoder's forward pass in torch, cut at the places where linears read their input.

A block is walked site by site (`DecoderBlock.enter`), so that a quantizer can look at a site's input and replace the
site's weights before their outputs are computed. Shape suffixes: B windows, T tokens, H hidden, D head channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F

from llmopt.models.config import DecoderConfig
from llmopt.models.families import ATTN_NORM, DOWN, GATE, K_NORM, MLP_NORM, Q_NORM, UP, K, O, Q, Site, V
from llmopt.models.rope import inv_freq

#: What a linear's input passes through first: int8 rounding where activations are quantized.
InputTransform: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class State:
    """One batch on its way through a block: the residual stream, and the input of the site last entered."""

    residual_BTH: torch.Tensor
    site_input: torch.Tensor


def rotary_tables(config: DecoderConfig, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [T, D], for positions 0 to T - 1."""
    angles_TD = torch.outer(torch.arange(tokens).float(), torch.from_numpy(inv_freq(config.rope, config.head_dim)))
    angles_TD = torch.cat((angles_TD, angles_TD), dim=-1)
    return angles_TD.cos(), angles_TD.sin()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last dimension (Zhang & Sennrich, arXiv:1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, eps)


@dataclass
class DecoderBlock:
    """One decoder block over float32 tensors, by their names within the block. `tensors` may be replaced on the way."""

    config: DecoderConfig
    tensors: dict[str, torch.Tensor]
    input_transform: dict[str, InputTransform] = field(default_factory=dict)
    half: bool = False  # linears multiply in BF16, as the models are served; everything else stays float32

    def enter(self, site: Site, state: State, rotary: tuple[torch.Tensor, torch.Tensor]) -> State:
        """Compute up to the input of `site`'s linears; sites come in the family's order."""
        x_BTH, h = state.residual_BTH, state.site_input
        if site.name == "qkv":
            return State(x_BTH, self._norm(ATTN_NORM, x_BTH))
        if site.name == "o":
            return State(x_BTH, self._attention(h, rotary))
        if site.name == "gate_up":
            x_BTH = x_BTH + self.linear(O, h)
            return State(x_BTH, self._norm(MLP_NORM, x_BTH))
        return State(x_BTH, F.silu(self.linear(GATE, h)) * self.linear(UP, h))

    def leave(self, state: State) -> torch.Tensor:
        """The block's output, from the state at its last site."""
        return state.residual_BTH + self.linear(DOWN, state.site_input)

    def forward(self, x_BTH: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The whole block at once."""
        state = State(x_BTH, x_BTH)
        for site in self.config.family.sites:
            state = self.enter(site, state, rotary)
        return self.leave(state)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name in self.input_transform:
            x = self.input_transform[name](x)
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if not self.half:
            return F.linear(x, weight, bias)
        y = F.linear(x.bfloat16(), weight.bfloat16()).float()
        return y if bias is None else y.add_(bias)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.tensors[f"{name}.weight"], self.config.norm_eps)

    def _attention(self, h_BTH: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Causal self-attention up to the input of the output projection."""
        config = self.config
        q = self._heads(Q, h_BTH, config.heads)
        k = self._heads(K, h_BTH, config.kv_heads)
        v = self._heads(V, h_BTH, config.kv_heads)
        if config.family.qk_norm:
            q, k = self._norm(Q_NORM, q), self._norm(K_NORM, k)
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        tokens = h_BTH.shape[1]
        mask = None
        if config.sliding_window is not None and config.sliding_window < tokens:
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - config.sliding_window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=config.heads != config.kv_heads
        )
        return out.transpose(1, 2).reshape(*h_BTH.shape[:2], -1)

    def _heads(self, name: str, h_BTH: torch.Tensor, heads: int) -> torch.Tensor:
        return self.linear(name, h_BTH).view(*h_BTH.shape[:2], heads, self.config.head_dim).transpose(1, 2)


def _rotate(x: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotate channel i with channel i + D / 2 (the layout of Hugging Face checkpoints)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos_TD + torch.cat((-second, first), dim=-1) * sin_TD
