"""The decoder as a stateful OpenVINO graph: token ids in, logits out, one KV cache variable for each key and value.

Inputs as openvino-genai gives them: `input_ids` and `position_ids` int64 [B, T], `attention_mask` int64 [B, P + T] with
P tokens already in the cache, `beam_idx` int32 [B]. Output: `logits` float32 [B, T, vocabulary]. The sub-graphs of
norm, rotary embedding, attention and cache have the forms that the CPU plugin fuses and that continuous batching turns
into paged attention; the tensor names and friendly names are part of that form.

Shape suffixes: B sequences, T tokens, H hidden, N heads, D head channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.backends import load
from llmopt.compilers.ov.constants import Constants, Node
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig
from llmopt.models.families import ATTN_NORM, DOWN, GATE, K_NORM, MLP_NORM, Q_NORM, UP, K, O, Q, V
from llmopt.models.rope import inv_freq

ov, op, util = load("openvino"), load("openvino.opset13"), load("openvino.op.util")

_MASKED = -65504.0  # far below any score, and still a number in float16


def build_decoder(config: DecoderConfig, checkpoint: Checkpoint, constants: Constants, *, round_head: bool) -> Node:
    """The model; its constants point at arrays that the scratch of `constants` keeps until the IR is saved.

    `round_head`: int8 rows for an lm_head that the checkpoint has as floats.
    """
    return _Decoder(config, checkpoint, constants, round_head).model()


@dataclass(frozen=True, slots=True)
class _Cache:
    """A key or value cache variable: what it held before this call, and what it holds after."""

    past: Node
    now: Node


class _Decoder:
    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint, constants: Constants, round_head: bool) -> None:
        self._config, self._checkpoint, self._constants, self._round_head = config, checkpoint, constants, round_head
        self._shapes = config.linear_shapes(0)
        self._inputs = {
            "input_ids": _parameter("input_ids", [-1, -1], np.int64),
            "attention_mask": _parameter("attention_mask", [-1, -1], np.int64),
            "position_ids": _parameter("position_ids", [-1, -1], np.int64),
            "beam_idx": _parameter("beam_idx", [-1], np.int32),
        }
        shape = op.shape_of(self._inputs["input_ids"])
        self._batch = op.gather(shape, _ints(0), _ints_scalar(0))
        self._tokens = op.gather(shape, _ints(1), _ints_scalar(0))
        self._sinks: list[Node] = []
        self._mask: Node | None = None

    def model(self) -> Node:
        config, family = self._config, self._config.family
        table = self._constants.matrix(f"{family.embedding}.weight")
        x_BTH = op.gather(table, self._inputs["input_ids"], _ints_scalar(0))
        rotary = self._rotary_tables()
        for index in range(config.layers):
            x_BTH = self._block(index, x_BTH, rotary)
        logits = self._head(self._norm(f"{family.final_norm}.weight", x_BTH), table)
        logits.output(0).get_tensor().set_names({"logits"})
        result = op.result(logits)
        result.set_friendly_name("logits")
        return ov.Model([result], self._sinks, list(self._inputs.values()), family.model_type)

    def _block(self, index: int, x_BTH: Node, rotary: tuple[Node, Node]) -> Node:
        block = self._config.block(index)
        h_BTH = self._norm(f"{block}.{ATTN_NORM}.weight", x_BTH)
        x_BTH = op.add(x_BTH, self._linear(block, O, self._attention(index, h_BTH, rotary)))
        h_BTH = self._norm(f"{block}.{MLP_NORM}.weight", x_BTH)
        gated = op.multiply(op.swish(self._linear(block, GATE, h_BTH)), self._linear(block, UP, h_BTH))
        return op.add(x_BTH, self._linear(block, DOWN, gated))

    def _attention(self, index: int, h_BTH: Node, rotary: tuple[Node, Node]) -> Node:
        """Causal self-attention with a cache, up to the input of the output projection."""
        config, block = self._config, self._config.block(index)
        q = self._heads(block, Q, h_BTH, config.heads, Q_NORM)
        k = self._heads(block, K, h_BTH, config.kv_heads, K_NORM)
        v = self._heads(block, V, h_BTH, config.kv_heads, None)
        keys = self._cache(f"past_key_values.{index}.keypresent.{index}.key", _rotate(k, rotary, config.head_dim))
        values = self._cache(f"past_key_values.{index}.valuepresent.{index}.value", v)
        if self._mask is None:  # all blocks have as many tokens in their caches
            self._mask = self._causal_mask(keys.past)
        out_BNTD = op.scaled_dot_product_attention(
            _rotate(q, rotary, config.head_dim), self._repeat(keys.now), self._repeat(values.now), self._mask
        )
        out_BTND = op.transpose(out_BNTD, _ints(0, 2, 1, 3))
        return op.reshape(out_BTND, _ints(0, 0, config.heads * config.head_dim), True)

    def _heads(self, block: str, linear: str, h_BTH: Node, heads: int, norm: str | None) -> Node:
        """A projection cut into heads [B, N, T, D], each normed where the family has a norm there."""
        x_BTND = op.reshape(self._linear(block, linear, h_BTH), _ints(0, 0, heads, self._config.head_dim), True)
        if norm is not None and self._config.family.qk_norm:
            x_BTND = self._norm(f"{block}.{norm}.weight", x_BTND)
        return op.transpose(x_BTND, _ints(0, 2, 1, 3))

    def _linear(self, block: str, linear: str, x: Node) -> Node:
        prefix = f"{block}.{linear}"
        y = self._constants.linear(prefix, self._shapes[linear], x)
        y.set_friendly_name(prefix)
        return op.add(y, self._constants.vector(f"{prefix}.bias")) if linear in self._config.biases else y

    def _head(self, x_BTH: Node, table: Node) -> Node:
        """The logits: lm_head as the checkpoint has it (tied: the embedding's own node), or rounded to int8 rows."""
        config, head = self._config, self._config.family.head
        own = any(name.startswith(f"{head}.") for name in self._checkpoint.tensors)
        shape = (config.vocab_size, config.hidden_size)
        plain = not own or self._constants.is_plain(head)
        if own and not (plain and self._round_head):
            return self._constants.linear(head, shape, x_BTH)
        if self._round_head:
            table = self._constants.rounded(f"{head if own else config.family.embedding}.weight", head)
        return op.matmul(x_BTH, table, False, True)

    def _norm(self, name: str, x: Node) -> Node:
        """Root mean square norm over the last dimension."""
        variance = op.reduce_mean(op.power(x, _floats(2.0)), _ints(-1), True)
        root = op.sqrt(op.add(variance, _floats(self._config.norm_eps)))
        return op.multiply(op.multiply(x, op.divide(_floats(1.0), root)), self._constants.vector(name))

    def _rotary_tables(self) -> tuple[Node, Node]:
        """cos and sin of every position, [B, 1, T, D]."""
        assert self._config.rope is not None
        frequencies = inv_freq(self._config.rope, self._config.head_dim).reshape(1, -1, 1)
        shape = op.concat([self._batch, _ints(1), _ints(1)], 0)
        frequencies = op.broadcast(op.constant(frequencies), shape, broadcast_spec="BIDIRECTIONAL")
        positions = op.convert(op.unsqueeze(self._inputs["position_ids"], _ints_scalar(1)), np.float32)
        angles = op.transpose(op.matmul(frequencies, positions, False, False), _ints(0, 2, 1))
        angles = op.concat([angles, angles], -1)
        return op.unsqueeze(op.cos(angles), _ints_scalar(1)), op.unsqueeze(op.sin(angles), _ints_scalar(1))

    def _cache(self, name: str, current: Node) -> _Cache:
        """Append [B, N, T, D] to the variable `name`, reordered by `beam_idx`."""
        heads, channels = self._config.kv_heads, self._config.head_dim
        info = util.VariableInfo()
        info.data_shape = ov.PartialShape([-1, heads, -1, channels])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = util.Variable(info)
        empty = op.broadcast(_floats(0.0), op.concat([self._batch, _ints(heads), _ints(0), _ints(channels)], 0))
        past = op.gather(op.read_value(empty, variable), self._inputs["beam_idx"], _ints_scalar(0))
        now = op.concat([past, current], 2)
        self._sinks.append(op.assign(now, variable))
        return _Cache(past, now)

    def _causal_mask(self, past: Node) -> Node:
        """0 where a token may look and far below any score elsewhere, [B, 1, T, P + T]."""
        before = op.gather(op.shape_of(past), _ints(2), _ints_scalar(0))
        first, end = op.squeeze(before, _ints_scalar(0)), op.squeeze(op.add(before, self._tokens), _ints_scalar(0))
        seen = op.unsqueeze(op.range(_ints_scalar(0), end, _ints_scalar(1), "i64"), _ints_scalar(0))
        own = op.unsqueeze(op.range(first, end, _ints_scalar(1), "i64"), _ints_scalar(1))
        causal = op.select(op.greater(seen, own), _floats(_MASKED), _floats(0.0))
        padded = op.subtract(_floats(1.0), op.convert(self._inputs["attention_mask"], np.float32))
        padded = op.multiply(padded, _floats(_MASKED))
        return op.add(op.unsqueeze(causal, _ints(0, 1)), op.unsqueeze(padded, _ints(1, 2)))

    def _repeat(self, kv: Node) -> Node:
        """Each KV head once for every query head that reads it, [B, N, T, D]."""
        config, times = self._config, self._config.heads // self._config.kv_heads
        if times == 1:
            return kv
        shape = op.concat([self._batch, _ints(config.kv_heads), _ints(times), _ints(1), _ints(config.head_dim)], 0)
        repeated = op.broadcast(op.unsqueeze(kv, _ints_scalar(2)), shape, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(repeated, _ints(0, config.heads, -1, config.head_dim), True)


def _rotate(x: Node, rotary: tuple[Node, Node], channels: int) -> Node:
    """Rotate channel i with channel i + D / 2 (the layout of Hugging Face checkpoints)."""
    cos, sin = rotary
    second = op.slice(x, _ints(channels // 2), _ints(np.iinfo(np.int64).max), _ints(1), _ints(3))
    first = op.slice(x, _ints(0), _ints(channels // 2), _ints(1), _ints(3))
    turned = op.concat([op.multiply(second, _floats(-1.0)), first], -1)
    return op.add(op.multiply(x, cos), op.multiply(turned, sin))


def _parameter(name: str, shape: list[int], dtype: type[np.generic]) -> Node:
    """An input; continuous batching looks it up by both of its names."""
    node = op.parameter(shape, dtype, name)
    node.output(0).get_tensor().set_names({name})
    node.set_friendly_name(name)
    return node


def _ints(*values: int) -> Node:
    return op.constant(np.array(values, np.int64))


def _ints_scalar(value: int) -> Node:
    return op.constant(np.array(value, np.int64))


def _floats(value: float) -> Node:
    return op.constant(np.array(value, np.float32))
