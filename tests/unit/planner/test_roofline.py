from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from llmopt.planner import hardware
from llmopt.planner.hardware import Hardware
from llmopt.planner.memory import activation_bytes, kv_sequence_bytes, weight_bytes
from llmopt.planner.precision import PRECISIONS, Precision
from llmopt.planner.roofline import Placement, Workload, predict, prompts_s, step_s
from llmopt.planner.shape import ModelShape, of_config

FP8, FP16, W4 = (PRECISIONS[name] for name in ("fp8", "fp16", "w4a16"))

#: Output tokens a second as NVIDIA published them for TensorRT-LLM 1.0 (docs/source/performance/perf-overview.md), FP8,
#: by prompt and answer in tokens.
LENGTHS = (
    (128, 128), (128, 2048), (128, 4096), (500, 2000), (1000, 1000), (1000, 2000), (2048, 128), (2048, 2048),
    (5000, 500), (20000, 2000),
)  # fmt: skip
PUBLISHED = {
    ("Llama-3.1-8B", "H200", 1): (27911, 26221, 18027, 20770, 17744, 16828, 3538, 12194, 3902, 1804),
    ("Llama-3.1-8B", "H100", 1): (28312, 22714, 14325, 17660, 15220, 13899, 3450, 9305, 3459, 1351),
    ("Llama-3.1-70B", "H200", 1): (3803, 4336, 2872, 3666, 2909, 2994, 442, 2003, 566, 283),
    ("Llama-3.1-70B", "H100", 2): (6378, 6651, 4199, 5222, 4205, 4146, 762, 3082, 898, 437),
    ("Llama-3.1-405B", "H200", 8): (3814, 5348, 4741, 4724, 3330, 3722, 456, 2948, 650, 505),
    ("Llama-3.1-405B", "H100", 8): (3627, 4340, 3116, 3994, 2919, 2895, 453, 2296, 610, 345),
}
#: Not used for the fit.
MIXTURES = {
    ("Qwen3-235B-A22B", "H200", 8): (30429, 42821, 26852, 28026, 23789, 22061, 3331, 16672, 3623, 1876),
    ("Llama-4-Maverick", "H200", 8): (63994, 40572, 24616, 37835, 31782, 34734, 7307, 20957, 8456, 4106),
}

#: Decoded tokens a second at 1, 4 and 16 requests, prompts of 128 tokens and answers of 64, and prompt tokens a second:
#: OpenVINO GenAI on two cores of a Zen 5 EPYC, a random Llama of 886M parameters; means of two repeats.
TWO_CORES = Hardware(
    name="two cores",
    kind="cpu",
    memory_bytes=24 << 30,
    bandwidth_bytes_s=34e9,  # measured at least; what the products reach of it is in the figures
    bandwidth_efficiency=1.0,
    # 512-bit units: 64, 128 and 256 operations a cycle and core at 4.1 GHz
    flops={"fp32": 0.52e12, "fp16": 1.05e12, "int8": 2.1e12},
)
W8 = Precision(name="int8 weights", bits=8, group_size=-1, scale_bytes=2, cpu_arithmetic="int8")
ON_CPU = {"int4": (W4, (60, 176, 280), 813), "int8": (W8, (41, 152, 344), 727), "bf16": (FP16, (22, 81.5, 199), 475)}


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_dense_models_are_predicted_as_nvidia_published_them(
    case: tuple[str, str, int], published: dict[str, ModelShape]
) -> None:
    errors = _errors(case, PUBLISHED[case], published)
    assert max(errors) < 0.5
    assert _rms(errors) < 0.25


def test_the_error_that_the_source_states_is_the_error(published: dict[str, ModelShape]) -> None:
    errors = [error for case, rates in PUBLISHED.items() for error in _errors(case, rates, published)]
    assert len(errors) == 60
    assert _rms(errors) == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize("case", MIXTURES, ids=str)
def test_mixtures_that_were_not_fitted_are_within_a_third(
    case: tuple[str, str, int], published: dict[str, ModelShape]
) -> None:
    assert _rms(_errors(case, MIXTURES[case], published)) < 0.33


@pytest.mark.parametrize("name", ON_CPU)
def test_our_cpu_engine_is_predicted_as_measured(name: str) -> None:
    """The bandwidth is what was measured at least, so what waits for it comes out too slow, by two fifths at most."""
    precision, rates, prompt = ON_CPU[name]
    placement = Placement(shape=_llama(2048, 16, 5632), precision=precision, hardware=TWO_CORES, kv_precision="int8")
    workload = Workload(prompt_tokens=128, output_tokens=64)
    found = [predict(placement, workload, batch).tokens_s for batch in (1, 4, 16)]
    worst = 0.2 if name == "int4" else 0.45
    assert all(-worst < rate / measured - 1 < 0.05 for rate, measured in zip(found, rates, strict=True))
    assert 128 / prompts_s(placement, 128) == pytest.approx(prompt, rel=0.15)


def test_a_small_model_on_our_cpu_engine_waits_for_the_step_itself() -> None:
    """0.1B parameters in int4, from the same study: 172 to 299 tokens a second alone, 1,646 of 16 requests."""
    shape = _llama(768, 9, 2048)
    placement = Placement(shape=shape, precision=W4, hardware=TWO_CORES, kv_precision="int8")
    workload = Workload(prompt_tokens=128, output_tokens=64)
    assert 172 < predict(placement, workload, 1).tokens_s < 299
    assert predict(placement, workload, 16).tokens_s == pytest.approx(1646, rel=0.25)


def test_decoding_alone_waits_for_the_weights(published: dict[str, ModelShape]) -> None:
    placement = _placement(published["Llama-3.1-70B"], FP16, "4xH100", 4)
    step, bound = step_s(placement, 1, 1000)
    assert bound == "memory"
    assert step > weight_bytes(placement.shape, FP16, 4) / 3.35e12


@pytest.mark.parametrize("name", ["fp16", "fp8", "w4a16"])
@pytest.mark.parametrize(("row", "ranks"), [("L4", 1), ("8xH100", 2), ("8xH100", 8), ("8xL40S", 8)])
def test_nothing_is_faster_than_the_peaks(row: str, ranks: int, name: str, published: dict[str, ModelShape]) -> None:
    shape, precision = published["Llama-3.1-8B"], PRECISIONS[name]
    placement = _placement(shape, precision, row, ranks)
    devices = placement.hardware
    # What 2 operations a parameter and token take at least, and what reading all but the embedding takes.
    products = 2 * (shape.parameters - 2 * shape.embedding)
    assert prompts_s(placement, 1024) > 1024 * products / (ranks * devices.flops[precision.arithmetic])
    read = weight_bytes(shape, precision) - 2 * shape.embedding
    for batch in (1, 16, 256):
        cache = batch * kv_sequence_bytes(shape, 1024, "fp16")
        assert step_s(placement, batch, 1024)[0] > (read + cache) / (ranks * devices.bandwidth_bytes_s)


@pytest.mark.parametrize("name", ["Llama-3.1-70B", "Qwen3-235B-A22B"])
def test_twice_the_devices_are_never_twice_as_fast(name: str, published: dict[str, ModelShape]) -> None:
    for batch in (1, 32, 512):
        rates = [
            predict(_placement(published[name], FP8, "8xH200", ranks), Workload(), batch).tokens_s
            for ranks in (1, 2, 4, 8)
        ]
        assert all(slow < fast < 2 * slow for slow, fast in itertools.pairwise(rates))


def test_a_large_batch_waits_for_the_products(published: dict[str, ModelShape]) -> None:
    placement = _placement(published["Llama-3.1-8B"], FP16, "A10G", 1)
    assert step_s(placement, 512, 10)[1] == "compute"


def test_pcie_is_what_tensor_parallelism_waits_for(published: dict[str, ModelShape]) -> None:
    placement = _placement(published["Llama-3.1-8B"], W4, "8xL4", 8)
    assert step_s(placement, 256, 100)[1] == "links"


def test_twice_the_prompt_takes_more_than_twice_the_time(published: dict[str, ModelShape]) -> None:
    placement = _placement(published["Llama-3.1-8B"], FP16, "H100", 1)
    short, long = prompts_s(placement, 32768), prompts_s(placement, 65536)
    assert 2.5 < long / short < 4


def test_a_window_spares_the_square(published: dict[str, ModelShape]) -> None:
    shape = published["Llama-3.1-8B"]
    layers = tuple(replace(layer, window=4096) for layer in shape.layers)
    windowed = replace(shape, layers=layers)
    long = 65536
    full = prompts_s(_placement(shape, FP16, "H100", 1), long)
    assert prompts_s(_placement(windowed, FP16, "H100", 1), long) < 0.6 * full
    assert step_s(_placement(windowed, FP16, "H100", 1), 8, long) < step_s(_placement(shape, FP16, "H100", 1), 8, long)


def test_a_mixture_reads_more_of_its_experts_the_more_tokens_there_are(published: dict[str, ModelShape]) -> None:
    placement = _placement(published["Mixtral-8x7B"], FP16, "2xH100", 2)
    one, many = step_s(placement, 1, 10)[0], step_s(placement, 64, 10)[0]
    dense = weight_bytes(placement.shape, FP16, 2) / (0.65 * 3.35e12)
    assert one < 0.4 * dense
    assert many > 0.95 * dense


def test_times_grow_with_the_batch_and_so_does_the_rate(published: dict[str, ModelShape]) -> None:
    placement = _placement(published["Llama-3.1-8B"], FP8, "H100", 1)
    found = [predict(placement, Workload(), batch) for batch in (1, 2, 8, 32, 128, 512)]
    for small, large in itertools.pairwise(found):
        assert small.ttft_s < large.ttft_s
        assert small.tpot_s < large.tpot_s
        assert small.tokens_s < large.tokens_s
        assert small.ttft_percentile_s(0.99) < large.ttft_percentile_s(0.99)


def test_tokens_a_second_are_the_batch_over_the_times(published: dict[str, ModelShape]) -> None:
    """Little's law: requests in flight are the rate of requests times the time of one."""
    placement, workload = _placement(published["Llama-3.1-8B"], FP8, "H100", 1), Workload()
    for batch in (1, 7, 300):
        found = predict(placement, workload, batch)
        request_s = found.ttft_s + (workload.output_tokens - 1) * found.tpot_s
        assert found.tokens_s / workload.output_tokens * request_s == pytest.approx(batch)


def test_percentiles_are_in_order_and_start_from_the_prompt_alone(published: dict[str, ModelShape]) -> None:
    found = predict(_placement(published["Llama-3.1-8B"], FP8, "H100", 1), Workload(), 400)
    tails = [found.ttft_percentile_s(share) for share in (0.5, 0.9, 0.99, 0.999)]
    assert tails == sorted(tails)
    assert tails[0] >= found.prompt_s
    assert tails[-1] <= found.step_s + 400 * found.prompt_s


def test_a_request_alone_has_no_queue(published: dict[str, ModelShape]) -> None:
    found = predict(_placement(published["Llama-3.1-8B"], FP8, "H100", 1), Workload(), 1)
    assert found.busy == 0
    assert found.ttft_percentile_s(0.999) == pytest.approx(found.prompt_s + found.step_s)


def test_answers_of_one_token_have_no_time_between_tokens(published: dict[str, ModelShape]) -> None:
    found = predict(_placement(published["Llama-3.1-8B"], FP8, "H100", 1), Workload(output_tokens=1), 4)
    assert found.tpot_s == 0
    assert found.tokens_s > 0


def test_stages_keep_the_rate_up_and_the_times_long(published: dict[str, ModelShape]) -> None:
    shape, row = published["Llama-3.1-70B"], hardware.find("2xH100")
    single = Placement(shape=shape, precision=FP8, hardware=row)
    staged = Placement(shape=shape, precision=FP8, hardware=row, pipeline_parallel=2)
    alone, divided = (predict(each, Workload(), 1) for each in (single, staged))
    assert divided.tpot_s == pytest.approx(alone.tpot_s, rel=0.01)  # one request gains nothing
    assert predict(staged, Workload(), 128).tokens_s > 1.3 * predict(single, Workload(), 64).tokens_s


def _placement(shape: ModelShape, precision: Precision, row: str, ranks: int) -> Placement:
    return Placement(shape=shape, precision=precision, hardware=hardware.find(row), tensor_parallel=ranks)


def _llama(hidden: int, layers: int, width: int) -> ModelShape:
    return of_config(
        {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": width,
        },
        name="random",
    )


def _errors(case: tuple[str, str, int], rates: tuple[int, ...], published: dict[str, ModelShape]) -> list[float]:
    """Natural logarithms of predicted over published, at the largest batch that NVIDIA's memory settings allow."""
    name, device, ranks = case
    shape, row = published[name], hardware.find(f"{ranks}x{device}")
    placement = Placement(
        shape=shape, precision=FP8, hardware=row, tensor_parallel=ranks, kv_precision="fp8"
    )  # NVIDIA's FP8 checkpoints keep keys and values in FP8 too
    taken = weight_bytes(shape, FP8, ranks) + activation_bytes(
        shape, FP8, tensor_parallel=ranks, tokens=8192, sequences=256
    )
    free = 0.95 * (1.02 * row.memory_bytes - taken - 1.5e9)  # a driver offers 2 % more than the data sheet
    errors = []
    for (prompt, output), rate in zip(LENGTHS, rates, strict=True):
        batch = min(2048, int(free / kv_sequence_bytes(shape, prompt + 0.75 * output, "fp8", ranks)))
        found = predict(placement, Workload(prompt_tokens=prompt, output_tokens=output), batch)
        errors.append(math.log(found.tokens_s / rate))
    return errors


def _rms(errors: list[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors))
