from __future__ import annotations

import pytest

from llmopt.errors import SettingsError
from llmopt.planner.memory import check_parallel, kv_sequence_bytes, memory, weight_bytes
from llmopt.planner.precision import PRECISIONS, Precision
from llmopt.planner.shape import ModelShape, read

FP16, W4 = PRECISIONS["fp16"], PRECISIONS["w4a16"]


@pytest.mark.parametrize(("precision", "gigabytes"), [("fp32", 280), ("fp16", 140)])
def test_70b_parameters_take_280_gb_in_fp32_and_140_in_fp16(precision: str, gigabytes: int) -> None:
    assert round(weight_bytes(read("70B"), PRECISIONS[precision])) == gigabytes * 10**9


def test_sixteen_bits_are_two_bytes_a_parameter(published: dict[str, ModelShape]) -> None:
    for name, shape in published.items():
        assert weight_bytes(shape, FP16) == pytest.approx(2 * shape.parameters), name


def test_llama_2_70b_with_eight_kv_heads_keeps_a_third_of_a_megabyte_a_token(published: dict[str, ModelShape]) -> None:
    """320 KiB: 80 layers, keys and values of 8 heads of 128, two bytes each."""
    assert kv_sequence_bytes(published["Llama-3.1-70B"], 1, "fp16") == 320 * 1024


def test_int8_and_fp8_halve_the_cache(published: dict[str, ModelShape]) -> None:
    shape = published["Llama-3.1-8B"]
    full = kv_sequence_bytes(shape, 1000, "fp16")
    assert kv_sequence_bytes(shape, 1000, "fp8") == kv_sequence_bytes(shape, 1000, "int8") == full / 2


def test_an_unknown_kv_precision_is_an_error(published: dict[str, ModelShape]) -> None:
    with pytest.raises(SettingsError, match="the KV cache cannot be `fp4`"):
        kv_sequence_bytes(published["Llama-3.1-8B"], 1, "fp4")


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_together_hold_the_model_and_what_each_repeats(
    precision: Precision, ranks: int, published: dict[str, ModelShape]
) -> None:
    shape = published["Llama-3.1-70B"]
    whole, rank = weight_bytes(shape, precision), weight_bytes(shape, precision, ranks)
    repeated = sum(layer.plain for layer in shape.layers) * precision.plain_bytes
    assert whole <= ranks * rank <= 1.001 * whole + ranks * repeated


def test_kv_heads_are_repeated_on_ranks_that_outnumber_them(published: dict[str, ModelShape]) -> None:
    """Four KV heads on eight ranks: each keeps one, so the eighth of a cache is a quarter."""
    shape = published["Qwen3-235B-A22B"]
    whole = kv_sequence_bytes(shape, 100, "fp16")
    assert kv_sequence_bytes(shape, 100, "fp16", 4) == whole / 4
    assert kv_sequence_bytes(shape, 100, "fp16", 8) == whole / 4


def test_a_latent_cannot_be_divided(published: dict[str, ModelShape]) -> None:
    shape = published["DeepSeek-V3"]
    assert kv_sequence_bytes(shape, 100, "fp16", 8) == kv_sequence_bytes(shape, 100, "fp16")


def test_stages_share_the_layers_and_the_fullest_counts(published: dict[str, ModelShape]) -> None:
    shape = published["Llama-3.1-8B"]
    stage, whole = weight_bytes(shape, FP16, 1, 2), weight_bytes(shape, FP16)
    layers = whole - 2 * (2 * shape.embedding + shape.other)
    assert stage == pytest.approx(layers / 2 + 2 * (shape.embedding + shape.other))


def test_layers_that_do_not_divide_lie_with_the_first_stages(published: dict[str, ModelShape]) -> None:
    shape = published["DeepSeek-V2-Lite"]  # 27 layers
    assert kv_sequence_bytes(shape, 100, "fp16", 1, 2) == kv_sequence_bytes(shape, 100, "fp16") * 14 / 27


def test_memory_grows_with_every_size(published: dict[str, ModelShape]) -> None:
    def total(*, batch: int = 8, length: int = 4096, tokens: int = 8192) -> int:
        return memory(
            published["Llama-3.1-8B"], FP16, max_batch_size=batch, max_seq_len=length, max_num_tokens=tokens
        ).total

    assert total() < total(batch=16) < total(batch=16, length=8192) < total(batch=16, length=8192, tokens=16384)


def test_an_h100_holds_llama_8b_with_a_hundred_sequences_of_4096(published: dict[str, ModelShape]) -> None:
    found = memory(published["Llama-3.1-8B"], FP16, max_batch_size=100, max_seq_len=4096, max_num_tokens=8192)
    assert found.weights == 16_060_522_496
    assert found.kv_cache == 100 * 4096 * 131072
    assert found.total < 80 * 10**9


@pytest.mark.parametrize(("ranks", "message"), [(3, "28 attention heads"), (7, "4 KV heads")])
def test_heads_that_do_not_divide_are_refused(ranks: int, message: str, published: dict[str, ModelShape]) -> None:
    with pytest.raises(SettingsError, match=message):
        check_parallel(published["Qwen2.5-7B"], ranks)


def test_more_stages_than_layers_are_refused(published: dict[str, ModelShape]) -> None:
    with pytest.raises(SettingsError, match="32 layers"):
        check_parallel(published["Llama-3.1-8B"], 1, 33)
