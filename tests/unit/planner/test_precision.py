from __future__ import annotations

from typing import Any

import pytest

from llmopt.errors import SettingsError
from llmopt.planner import hardware, precision
from llmopt.planner.memory import weight_bytes
from llmopt.planner.precision import PRECISIONS
from llmopt.planner.shape import Linear, ModelShape, of_config


def test_four_bits_in_groups_of_128_take_a_scale_each() -> None:
    linear = Linear(rows=256, columns=1024)
    assert PRECISIONS["w4a16"].linear_bytes(linear) == 256 * 1024 / 2 + 256 * 8 * 2


def test_a_last_group_that_is_not_full_has_a_scale_too() -> None:
    assert PRECISIONS["w4a16"].linear_bytes(Linear(rows=1, columns=130)) == 65 + 2 * 2


def test_int8_has_one_scale_a_row() -> None:
    assert PRECISIONS["int8"].linear_bytes(Linear(rows=256, columns=1024)) == 256 * 1024 + 256 * 4


@pytest.mark.parametrize(("alias", "name"), [("BF16", "fp16"), ("int4", "w4a16"), ("w8a8", "int8"), ("fp8", "fp8")])
def test_other_words_for_a_precision_are_known(alias: str, name: str) -> None:
    assert precision.find(alias).name == name


def test_an_unknown_precision_is_an_error_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="unknown precision `fp9`") as caught:
        precision.find("fp9")
    assert caught.value.hint == "did you mean `fp8`?"


@pytest.mark.parametrize(("row", "lacking"), [("A100", "fp8"), ("T4", "fp8"), ("c7i.8xlarge", "fp8")])
def test_fp8_is_refused_where_there_is_no_arithmetic_for_it(row: str, lacking: str) -> None:
    reason = precision.unsupported(PRECISIONS[lacking], hardware.find(row))
    assert reason is not None
    assert "no FP8 arithmetic" in reason


def test_everything_runs_on_an_h100() -> None:
    assert [precision.unsupported(row, hardware.find("H100")) for row in PRECISIONS.values()] == [None] * 5


def test_a_plain_checkpoint_lies_in_no_precision_of_its_own(published: dict[str, ModelShape]) -> None:
    assert precision.stored(published["Llama-3.1-8B"]) is None


@pytest.mark.parametrize(
    ("config", "bits", "group_size"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4, 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8, -1),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4, 64),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
            },
            4,
            32,
        ),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "W4A16_AWQ", "group_size": 128}}, 4, 128),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, 8, 0),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8, 128 * 128),
    ],
)
def test_what_config_json_says_of_the_disk_is_a_precision(config: dict[str, Any], bits: int, group_size: int) -> None:
    found = precision.stored(_quantized(config))
    assert found is not None
    assert (found.bits, found.group_size) == (bits, group_size)


@pytest.mark.parametrize("config", [{"quant_method": "bitnet"}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}])
def test_a_quantization_without_known_sizes_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="knows no sizes"):
        precision.stored(_quantized(config))


def test_gpt_oss_20b_takes_what_its_files_take(published: dict[str, ModelShape]) -> None:
    """12.8 GiB, by OpenAI's model card: its experts are MXFP4, the rest BF16."""
    shape = published["gpt-oss-20b"]
    on_disk = precision.stored(shape)
    assert on_disk is not None
    assert weight_bytes(shape, on_disk) / 2**30 == pytest.approx(12.8, rel=0.01)


def test_deepseek_v3_takes_what_its_files_take(published: dict[str, ModelShape]) -> None:
    """About 673 GB of the 688 GB of its repository, the rest being the layer that predicts a further token."""
    shape = published["DeepSeek-V3"]
    on_disk = precision.stored(shape)
    assert on_disk is not None
    assert weight_bytes(shape, on_disk) / 1e9 == pytest.approx(673, rel=0.01)


def _quantized(config: dict[str, Any]) -> ModelShape:
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    values = {"model_type": "llama", "vocab_size": 100, **sizes, "quantization_config": config}
    return of_config(values, name="x")
