"""Checkpoints as other tools write them, packed here word by word from the descriptions of their layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmopt.errors import LlmoptError
from llmopt.formats.base import QuantizedReader
from llmopt.formats.reading import open_quantized
from llmopt.models.checkpoint import Checkpoint

PREFIX = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS, GROUP = 32, 96, 32
GROUPS = COLUMNS // GROUP

Tensors = dict[str, torch.Tensor]
Open = Callable[..., QuantizedReader]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """opened(quantization_config, tensors of one linear, beside={file: content}) -> reader of a checkpoint of it."""

    def make(config: dict[str, Any] | None, tensors: Tensors, **beside: dict[str, Any]) -> QuantizedReader:
        values = {"model_type": "llama"} | ({} if config is None else {"quantization_config": config})
        (tmp_path / "config.json").write_text(json.dumps(values))
        for name, content in beside.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        save_file({f"{PREFIX}.{suffix}": tensor for suffix, tensor in tensors.items()}, tmp_path / "model.safetensors")
        reader = open_quantized(Checkpoint.open(tmp_path))
        assert reader is not None
        return reader

    return make


def weight_of(reader: QuantizedReader, shape: tuple[int, int] = (ROWS, COLUMNS)) -> np.ndarray:
    weight = reader.linear(PREFIX, shape)
    assert weight is not None
    return weight.dequantize()


def integers(bits: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape)


def steps(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Scales that F16 and BF16 hold."""
    return (np.random.default_rng(seed).integers(1, 128, shape) / 1024).astype(np.float32)


def words(codes: list[int], bits: int) -> list[int]:
    """One number of codes back to back, the first one lowest, cut into signed 32-bit words."""
    number = sum(int(code) << bits * place for place, code in enumerate(codes))
    cut = [number >> 32 * i & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in cut]


def down_columns(codes: np.ndarray, bits: int) -> torch.Tensor:
    return torch.tensor([words(list(column), bits) for column in codes.T], dtype=torch.int32).T.contiguous()


def along_rows(codes: np.ndarray, bits: int) -> torch.Tensor:
    return torch.tensor([words(list(row), bits) for row in codes], dtype=torch.int32)


def gptq(
    codes_OI: np.ndarray, zero_OG: np.ndarray, scale_OG: np.ndarray, bits: int, *, stored_less: int = 1
) -> Tensors:
    """Without g_idx."""
    return {
        "qweight": down_columns(codes_OI.T, bits),
        "qzeros": along_rows((zero_OG.T - stored_less) % (1 << bits), bits),
        "scales": torch.from_numpy(scale_OG.T.copy()).half(),
    }


def config_of_gptq(bits: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": False, "desc_act": False} | more


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_of_both_versions_without_g_idx(opened: Open, bits: int, form: str) -> None:
    codes, zero = integers(bits, (ROWS, COLUMNS)), integers(bits, (ROWS, GROUPS), 2)
    scale, group = steps((ROWS, GROUPS)), np.arange(COLUMNS) // GROUP
    reader = opened(
        config_of_gptq(bits, checkpoint_format=form), gptq(codes, zero, scale, bits, stored_less=int(form == "gptq"))
    )
    assert np.array_equal(weight_of(reader), (codes - zero[:, group]) * scale[:, group])


@pytest.mark.parametrize("sym", [True, False])
def test_gptq_with_columns_in_any_order(opened: Open, sym: bool) -> None:
    codes, scale = integers(4, (ROWS, COLUMNS)), steps((ROWS, GROUPS))
    zero = np.full((ROWS, GROUPS), 8) if sym else integers(4, (ROWS, GROUPS), 2)
    group = np.random.default_rng(3).permutation(np.arange(COLUMNS) // GROUP)
    tensors = gptq(codes, zero, scale, 4) | {"g_idx": torch.from_numpy(group.astype(np.int32))}
    reader = opened(config_of_gptq(4, desc_act=True, sym=sym), tensors)
    assert np.array_equal(weight_of(reader), (codes - zero[:, group]) * scale[:, group])
    weight = reader.linear(PREFIX, (ROWS, COLUMNS))
    assert weight is not None
    assert weight.order_I is not None
    assert (weight.zero_OG is None) == sym


def test_gptq_that_lost_its_order_is_refused(opened: Open) -> None:
    tensors = gptq(integers(4, (ROWS, COLUMNS)), np.full((ROWS, GROUPS), 8), steps((ROWS, GROUPS)), 4)
    with pytest.raises(LlmoptError, match=r"no tensor `.*g_idx`"):
        opened(config_of_gptq(4, desc_act=True), tensors).check(PREFIX, (ROWS, COLUMNS))


def test_gptq_with_unequal_groups_is_refused_not_misread(opened: Open) -> None:
    tensors = gptq(integers(4, (ROWS, COLUMNS)), np.full((ROWS, GROUPS), 8), steps((ROWS, GROUPS)), 4)
    group = np.arange(COLUMNS) // GROUP
    group[5] = 2
    with pytest.raises(LlmoptError, match="not equally large"):
        weight_of(opened(config_of_gptq(4), tensors | {"g_idx": torch.from_numpy(group.astype(np.int32))}))


def test_gptq_settings_of_single_linears(opened: Open) -> None:
    codes, zero, scale = integers(8, (ROWS, COLUMNS)), integers(8, (ROWS, GROUPS), 2), steps((ROWS, GROUPS))
    dynamic = {"-:.*down": {}, r"+:model\.layers\.0\..*up": {"bits": 8}, ".*": {"bits": 2}}
    reader = opened(config_of_gptq(4, dynamic=dynamic), gptq(codes, zero, scale, 8))
    group = np.arange(COLUMNS) // GROUP
    assert np.array_equal(weight_of(reader), (codes - zero[:, group]) * scale[:, group])
    assert reader.encoding.scheme("model.layers.0.mlp.down_proj") is None
    other = reader.encoding.scheme("model.layers.1.mlp.up_proj")
    assert other is not None
    assert other.bits == 2


def test_gptq_settings_beside_config_json(opened: Open) -> None:
    codes, zero, scale = integers(4, (ROWS, COLUMNS)), integers(4, (ROWS, GROUPS), 2), steps((ROWS, GROUPS))
    said = {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
    reader = opened(None, gptq(codes, zero, scale, 4), quantize_config=said)
    group = np.arange(COLUMNS) // GROUP
    assert np.array_equal(weight_of(reader), (codes - zero[:, group]) * scale[:, group])


def awq(codes_OI: np.ndarray, zero_OG: np.ndarray, scale_OG: np.ndarray) -> Tensors:
    """AutoAWQ's gemm: eight columns to a word, nibble n holding the column that this order has there."""

    def interleaved(codes_RO: np.ndarray) -> torch.Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        rows = [[row[start + order[n]] for start in range(0, len(row), 8) for n in range(8)] for row in codes_RO]
        return along_rows(np.array(rows), 4)

    scales = torch.from_numpy(scale_OG.T.copy()).half()
    return {"qweight": interleaved(codes_OI.T), "qzeros": interleaved(zero_OG.T), "scales": scales}


@pytest.mark.parametrize(
    "config",
    [
        {"version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True},
        {"version": "GEMM", "w_bit": 4, "q_group_size": GROUP},
        {"checkpoint_format": "gemm", "bits": 4, "group_size": GROUP, "sym": False, "modules_to_not_convert": None},
    ],
    ids=["AutoAWQ", "AutoAWQ before 0.1", "GPTQModel"],
)
def test_awq_of_three_tools(opened: Open, config: dict[str, Any]) -> None:
    codes, zero, scale = integers(4, (ROWS, COLUMNS)), integers(4, (ROWS, GROUPS), 2), steps((ROWS, GROUPS))
    reader = opened({"quant_method": "awq"} | config, awq(codes, zero, scale))
    group = np.arange(COLUMNS) // GROUP
    assert np.array_equal(weight_of(reader), (codes - zero[:, group]) * scale[:, group])


def compressed(bits: int, *, form: str = "pack-quantized", inputs: Any = None, **weights: Any) -> dict[str, Any]:
    """A quantization_config of llm-compressor."""
    own = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP} | weights
    group = {"targets": ["Linear"], "weights": own, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


SHAPE = torch.tensor([ROWS, COLUMNS])


def loosely(codes: np.ndarray, bits: int) -> torch.Tensor:
    """As compressed-tensors packed before 0.15: as many codes to a word as fit, the rest of its bits unused."""
    fit = 32 // bits
    return torch.tensor(
        [[words(list(row[start : start + fit]), bits)[0] for start in range(0, len(row), fit)] for row in codes],
        dtype=torch.int64,
    ).to(torch.int32)


@pytest.mark.parametrize("pack", [along_rows, loosely], ids=["dense", "loose"])
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7])
def test_llm_compressor_packed_in_both_ways(
    opened: Open, bits: int, pack: Callable[[np.ndarray, int], torch.Tensor]
) -> None:
    codes, zero, scale = integers(bits, (ROWS, COLUMNS)), integers(bits, (ROWS, GROUPS), 2), steps((ROWS, GROUPS))
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": torch.from_numpy(scale).bfloat16(),
        "weight_zero_point": pack(zero.T, bits).T.contiguous(),
        "weight_shape": SHAPE,
    }
    reader = opened(compressed(bits, symmetric=False), tensors)
    group = np.arange(COLUMNS) // GROUP
    assert np.array_equal(weight_of(reader), (codes - zero[:, group]) * scale[:, group])


def test_llm_compressor_with_columns_in_any_order(opened: Open) -> None:
    codes, scale = integers(4, (ROWS, COLUMNS)), steps((ROWS, GROUPS))
    group = np.random.default_rng(3).permutation(np.arange(COLUMNS) // GROUP)
    tensors = {
        "weight_packed": along_rows(codes, 4),
        "weight_scale": torch.from_numpy(scale).bfloat16(),
        "weight_shape": SHAPE,
        "weight_g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    reader = opened(compressed(4, actorder="group"), tensors)
    assert np.array_equal(weight_of(reader), (codes - 8) * scale[:, group])


def test_int8_with_zero_points(opened: Open) -> None:
    codes, zero, scale = integers(8, (ROWS, COLUMNS)) - 128, integers(8, (ROWS, 1), 2) - 128, steps((ROWS, 1))
    tensors = {
        "weight": torch.from_numpy(codes.astype(np.int8)),
        "weight_scale": torch.from_numpy(scale).bfloat16(),
        "weight_zero_point": torch.from_numpy(zero.astype(np.int8)),
    }
    config = compressed(8, form="int-quantized", symmetric=False, strategy="channel", group_size=None)
    assert np.array_equal(weight_of(opened(config, tensors)), (codes - zero) * scale)


def test_fp8_in_blocks(opened: Open) -> None:
    """DeepSeek's: 128 x 128, the last rows a block of their own."""
    values = (torch.randn(160, 256, generator=torch.Generator().manual_seed(0)) * 50).to(torch.float8_e4m3fn)
    scale = torch.from_numpy(steps((2, 2)))
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
    reader = opened(config, {"weight": values, "weight_scale_inv": scale})
    row, column = np.arange(160) // 128, np.arange(256) // 128
    expected = values.float().numpy() * scale.numpy()[row][:, column]
    assert np.array_equal(weight_of(reader, (160, 256)), expected)
    assert reader.activations(PREFIX) == "dynamic"


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5])], ids=["scalar", "vector"])
def test_fp8_with_one_scale(opened: Open, scale: torch.Tensor) -> None:
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    tensors = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor([0.25])}
    reader = opened({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, tensors)
    assert np.array_equal(weight_of(reader), values.float().numpy() * np.float32(0.5))
    assert reader.input_scale(PREFIX) == 0.25


def modelopt_int4(codes_OI: np.ndarray) -> torch.Tensor:
    """Two's complement nibbles, an even out-feature low and the odd one after it high."""
    signed = (codes_OI - 8) & 15
    return torch.from_numpy((signed[0::2] + 16 * signed[1::2]).astype(np.uint8))


@pytest.mark.parametrize("flat", [True, False], ids=["config.json alone", "with hf_quant_config.json"])
def test_modelopt_with_an_input_that_is_multiplied_first(opened: Open, flat: bool) -> None:
    codes, size = integers(4, (ROWS, 256)), 128 if flat else 64
    scale, smooth = steps((ROWS, 256 // size)), steps((256,), 5) * 8
    tensors = {
        "weight": modelopt_int4(codes),
        "weight_scale": torch.from_numpy(scale),
        "pre_quant_scale": torch.from_numpy(smooth).bfloat16(),
    }
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "ignore": ["lm_head"]}
    said = {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": True}
    beside = {"producer": {"name": "modelopt"}, "quantization": said | {"kv_cache_quant_algo": None}}
    reader = opened(config, tensors) if flat else opened(None, tensors, hf_quant_config=beside)
    expected = (codes - 8) * scale[:, np.arange(256) // size] * smooth
    assert np.allclose(weight_of(reader, (ROWS, 256)), expected, rtol=1e-6, atol=0)


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
W8 = {"form": "int-quantized", "strategy": "channel", "group_size": None}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized as `bitsandbytes`"),
        (config_of_gptq(4, checkpoint_format="marlin"), "GPTQ checkpoint format `marlin`"),
        (config_of_gptq(5), "GPTQ with 5 bits"),
        ({"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": 128}, "AWQ version `gemv`"),
        (compressed(8, inputs=INT8 | {"symmetric": False}, **W8), "with zero points beside 8-bit `int`"),
        (compressed(8, inputs=INT8 | {"strategy": "tensor"}, **W8), "`dynamic` by `tensor`"),
        (compressed(4, inputs=INT8), "beside 4-bit `int`"),
        (compressed(4, form="nvfp4-pack-quantized"), "format `nvfp4-pack-quantized`"),
        (compressed(8, strategy="block", block_structure=[128, 128]), "weights of `block`"),
        (compressed(4) | {"transform_config": {"config_groups": {"u": {}}}}, "transforms or sparsity"),
        (compressed(4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "transforms or sparsity"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, r"blocks of `\[64, 128\]`"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt algorithm `NVFP4`"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "KV cache in `NVFP4`"),
    ],
)
def test_what_we_do_not_read_is_refused_with_its_name(opened: Open, config: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmoptError, match=message):
        opened(config, {"weight": torch.zeros(1)})


def test_a_config_of_other_weights_is_refused(opened: Open) -> None:
    tensors = gptq(integers(4, (ROWS, COLUMNS)), np.full((ROWS, GROUPS), 8), steps((ROWS, GROUPS)), 4)
    with pytest.raises(LlmoptError, match=r"qweight` is I32 \[12, 32\] where .* asks for I32 \[24, 32\]"):
        opened(config_of_gptq(8), tensors).check(PREFIX, (ROWS, COLUMNS))
