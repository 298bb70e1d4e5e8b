"""Which rows of q, k and v a rank gets, and rounding FP8 codes again."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from llmopt.compilers.trt_llm.config import EngineConfig
from llmopt.compilers.trt_llm.encode import nearest_e4m3, qkv_piece, to_largest_scale
from llmopt.formats.base import E4M3, QuantizedWeight
from llmopt.models.families import FAMILIES, K, Q, V

SIZE = 2
CONFIG = EngineConfig(
    architecture="LlamaForCausalLM",
    dtype="float16",
    layers=1,
    heads=12,
    kv_heads=4,
    head_size=SIZE,
    hidden_size=24,
    intermediate_size=24,
    vocab_size=8,
    max_positions=8,
    norm_epsilon=1e-6,
    activation="silu",
    norms=(),
    qkv_bias=False,
    dense_bias=False,
    mlp_bias=False,
    rotary_base=1e4,
    rotary_pct=1.0,
    rotary_scaling=None,
    algorithm=None,
    group_size=0,
    kv_cache="none",
    plain=(),
    tensor_parallel=1,
    pipeline_parallel=1,
)
Labels = list[np.ndarray]


def labels(qkv_layout: str, heads: int, kv_heads: int) -> Labels:
    """[rows, 2] of each linear: 0, 1, 2 for q, k, v, and the head; as the families have them."""
    q, k, v = ([(kind, head) for head in range(count)] for kind, count in enumerate((heads, kv_heads, kv_heads)))
    if qkv_layout == "separate":
        linears = [q, k, v]
    elif qkv_layout == "stacked":
        linears = [q + k + v]
    else:
        group = heads // kv_heads
        linears = [[row for kv in range(kv_heads) for row in (*q[kv * group : (kv + 1) * group], k[kv], v[kv])]]
    return [np.repeat(np.array(linear), SIZE, axis=0) for linear in linears]


@pytest.mark.parametrize("qkv_layout", ["separate", "stacked", "grouped"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp"),
    [
        (heads, kv_heads, tp)
        for heads, kv_heads in ((12, 12), (12, 4), (12, 2), (12, 1), (6, 3))
        for tp in (1, 2, 3, 4, 6, 12)
        if heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
    ],
)
def test_a_rank_has_its_heads_in_order_and_the_kv_heads_that_they_read(
    qkv_layout: Literal["separate", "stacked", "grouped"], heads: int, kv_heads: int, tp: int
) -> None:
    config = replace(CONFIG, heads=heads, kv_heads=kv_heads, tensor_parallel=tp)
    names = (Q, K, V) if qkv_layout == "separate" else ("qkv",)
    family = replace(FAMILIES["llama"], qkv_layout=qkv_layout, qkv=names)
    arrays = labels(qkv_layout, heads, kv_heads)
    for rank in range(tp):
        own = range(rank * heads // tp, (rank + 1) * heads // tp)
        read = sorted({head * kv_heads // heads for head in own})
        expected = [(0, head) for head in own] + [(kind, head) for kind in (1, 2) for head in read]
        found = qkv_piece(config, family, rank).of(arrays)
        assert found[::SIZE].tolist() == found[1::SIZE].tolist() == [list(row) for row in expected]


FINITE = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)


def test_codes_are_their_own_nearest() -> None:
    assert np.array_equal(nearest_e4m3(E4M3[FINITE]), FINITE)


def test_rounding_is_that_of_torch() -> None:
    """Ties among them: the middle between any two neighbours."""
    sizes = np.sort(E4M3[:0x7F])
    middles = (sizes[1:] + sizes[:-1]) / 2
    random = np.random.default_rng(0).normal(size=10000) * np.float32(448) / 4
    values = np.concatenate([middles, -middles, sizes / 3, random.clip(-448, 448)]).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(nearest_e4m3(values), expected)


def weight(scale: float) -> QuantizedWeight:
    codes = np.tile(FINITE, (2, 1))
    return QuantizedWeight(
        codes_OI=codes, scale_OG=np.full((2, 1), scale, np.float32), zero_OG=None, bits=8, kind="float"
    )


def test_a_scale_twice_as_large_costs_only_what_is_too_small_for_it() -> None:
    """Halved values have codes of their own but for those that become subnormal with half a step: 8 of each sign."""
    (large, small), changed = to_largest_scale([weight(0.5), weight(0.25)])
    assert np.array_equal(large.codes_OI, weight(0.5).codes_OI)
    differ = small.dequantize() != weight(0.25).dequantize()
    assert set(small.scale_OG.reshape(-1)) == {0.5}
    assert changed == int(differ.sum()) == 2 * 2 * 8


def test_equal_scales_are_left_alone() -> None:
    found, changed = to_largest_scale([weight(0.3), weight(0.3)])
    assert changed == 0
    assert all(np.array_equal(one.codes_OI, weight(0.3).codes_OI) for one in found)
