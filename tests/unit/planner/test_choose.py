from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmopt.errors import SettingsError
from llmopt.planner import hardware
from llmopt.planner.choose import KV_SHARE, RESERVED_BYTES, Limit, Option, best, options
from llmopt.planner.precision import PRECISIONS
from llmopt.planner.roofline import Workload
from llmopt.planner.shape import ModelShape, read


def planned(shape: ModelShape, row: str, precision: str, **how: Any) -> Option:
    return planned_all(shape, [row], [precision], **how)[0]


def planned_all(shape: ModelShape, rows: list[str], precisions: list[str], **how: Any) -> list[Option]:
    return options(
        shape,
        [hardware.find(row) for row in rows],
        [PRECISIONS[name] for name in precisions],
        **({"workload": Workload()} | how),
    )


def test_what_a_192_gb_instance_holds_of_70b_parameters() -> None:
    found = planned_all(read("70B"), ["g5.48xlarge"], list(PRECISIONS))
    assert {option.precision.name: option.fits for option in found} == {
        "fp32": False,
        "fp16": True,
        "fp8": False,
        "int8": True,
        "w4a16": True,
    }
    reasons = {option.precision.name: option.reason for option in found}
    assert reasons["fp32"] == "35.0 GB of weights on each of 8 devices, which has 22.5 GB free"
    assert reasons["fp8"] == "A10G has no FP8 arithmetic"
    half = next(option for option in found if option.precision.name == "fp16")
    assert half.tensor_parallel == 8  # 140 GB do not fit four of 24


def test_what_fits_stays_within_the_memory(published: dict[str, ModelShape]) -> None:
    rows = [row.name for row in hardware.instances()]
    for option in planned_all(published["Llama-3.1-70B"], rows, list(PRECISIONS)):
        if option.fits:
            assert option.memory is not None
            kind = option.hardware.kind
            there = option.hardware.memory_bytes - RESERVED_BYTES[kind]
            rest = there - option.memory.weights - option.memory.activations
            assert option.memory.kv_cache <= KV_SHARE[kind] * rest, option.hardware.name
            assert option.tensor_parallel * option.pipeline_parallel * option.replicas <= option.hardware.devices


@pytest.mark.parametrize(
    ("model", "precision", "row", "fits"),
    [
        ("Llama-3.1-405B", "fp16", "p5.48xlarge", False),  # 812 GB, two nodes of eight H100
        ("Llama-3.1-405B", "fp8", "p5.48xlarge", True),  # one, as Meta published it
        ("DeepSeek-V3", "fp8", "p5.48xlarge", False),  # 671 GB on 640
        ("DeepSeek-V3", "fp8", "p5en.48xlarge", True),  # one node of eight H200, as its README has it
        ("gpt-oss-120b", "w4a16", "H100", True),  # "runs on a single 80 GB GPU"
        ("Mixtral-8x7B", "fp16", "H100", False),  # 93 GB
        ("Mixtral-8x7B", "w4a16", "L40S", True),
        ("Llama-3.1-8B", "fp16", "T4", False),
        ("Llama-3.1-8B", "w4a16", "T4", True),
    ],
)
def test_what_is_known_to_fit_fits(
    model: str, precision: str, row: str, fits: bool, published: dict[str, ModelShape]
) -> None:
    assert planned(published[model], row, precision).fits is fits


@pytest.mark.parametrize(("row", "fits"), [("A10G", False), ("L4", True), ("c7i.8xlarge", False)])
def test_a_kv_cache_in_fp8_needs_the_arithmetic(row: str, fits: bool, published: dict[str, ModelShape]) -> None:
    assert planned(published["Llama-3.1-8B"], row, "w4a16", kv_precision="fp8").fits is fits


def test_a_model_that_leaves_no_room_for_a_request_is_told_apart(published: dict[str, ModelShape]) -> None:
    option = planned(
        published["Llama-3.1-8B"], "A10G", "fp16", workload=Workload(prompt_tokens=60_000, output_tokens=60_000)
    )
    assert option.reason is not None
    assert "left for the KV cache" in option.reason


def test_a_cpu_holds_a_model_that_one_gpu_does_not() -> None:
    shape = read("70B")
    assert not planned(shape, "H100", "fp16").fits
    assert planned(shape, "r7i.48xlarge", "fp16").fits


def test_two_sockets_are_two_replicas(published: dict[str, ModelShape]) -> None:
    option = planned(published["Llama-3.1-8B"], "c7i.48xlarge", "int8")
    assert (option.replicas, option.tensor_parallel) == (2, 1)


def test_stages_are_for_what_tensor_parallelism_does_not_fit(published: dict[str, ModelShape]) -> None:
    """28 heads divide among four of eight devices only."""
    shape = replace(published["Qwen2.5-7B"], scale=20.0)  # 152B parameters with the heads of a small model
    option = planned(shape, "p4d.24xlarge", "int8")
    assert option.fits
    assert option.pipeline_parallel > 1
    assert shape.heads % option.tensor_parallel == 0


def test_the_batch_is_the_largest_that_meets_the_limit(published: dict[str, ModelShape]) -> None:
    from llmopt.planner.roofline import Placement, predict

    shape, limit = published["Llama-3.1-8B"], Limit(metric="tpot_ms", limit=20, percentile="p50")
    option = planned(shape, "p5.4xlarge", "fp8", limits=[limit])
    placement = Placement(shape=shape, precision=PRECISIONS["fp8"], hardware=option.hardware)
    assert option.prediction is not None
    assert option.prediction.tpot_s <= 0.020 < predict(placement, Workload(), option.batch + 1).tpot_s


def test_without_limits_the_batch_stops_where_the_rate_stops_growing(published: dict[str, ModelShape]) -> None:
    shape = published["Llama-3.1-8B"]
    free = planned(shape, "c7i.24xlarge", "w4a16")
    full = planned(shape, "c7i.24xlarge", "w4a16", workload=Workload(concurrency=256))
    assert free.batch < full.batch
    assert free.tokens_s is not None
    assert full.tokens_s is not None
    assert free.tokens_s >= 0.95 * full.tokens_s


def test_a_tighter_limit_costs_more(published: dict[str, ModelShape]) -> None:
    costs = [
        planned(
            published["Llama-3.1-8B"], "g6e.xlarge", "fp8", limits=[Limit(metric="tpot_ms", limit=limit)]
        ).usd_per_million
        for limit in (100, 50, 25)
    ]
    assert None not in costs
    assert costs == sorted(costs, key=lambda cost: cost or 0)
    assert costs[0] != costs[2]


def test_a_limit_that_a_request_alone_breaks_is_the_reason(published: dict[str, ModelShape]) -> None:
    option = planned(published["Llama-3.1-70B"], "g5.48xlarge", "fp16", limits=[Limit(metric="tpot_ms", limit=1)])
    assert option.reason is not None
    assert option.reason.endswith("for a request alone, asked for is `tpot_ms<=1`")


def test_a_rate_that_is_not_reached_is_the_reason(published: dict[str, ModelShape]) -> None:
    limit = Limit(metric="tokens_per_s", limit=1e6)
    option = planned(published["Llama-3.1-8B"], "g6.xlarge", "fp8", limits=[limit])
    assert "less than the 1,000,000 asked for" in (option.reason or "")


def test_the_rate_that_is_told_is_the_best_of_all_splits(published: dict[str, ModelShape]) -> None:
    limit = Limit(metric="tokens_per_s", limit=1e6)

    def reached(ranks: int | None) -> float:
        option = planned(published["Llama-3.1-70B"], "g5.48xlarge", "int8", limits=[limit], tensor_parallel=ranks)
        assert option.tokens_s is not None
        return option.tokens_s

    assert reached(None) == max(reached(4), reached(8))
    assert reached(4) > reached(8)


def test_later_percentiles_of_the_first_token_are_stricter(published: dict[str, ModelShape]) -> None:
    batches = [
        planned(
            published["Llama-3.1-8B"],
            "p5.4xlarge",
            "fp8",
            limits=[Limit(metric="ttft_ms", limit=40, percentile=percentile)],
        ).batch
        for percentile in ("p50", "p90", "p99")
    ]
    assert batches[0] > batches[1] > batches[2] > 0


@pytest.mark.parametrize("metric", ["goodput_share", "itl_ms", "errors"])
def test_what_is_not_predicted_cannot_be_asked_for(metric: str) -> None:
    with pytest.raises(SettingsError, match="does not predict"):
        Limit(metric=metric, limit=1)


def test_the_cost_is_the_price_over_the_tokens(published: dict[str, ModelShape]) -> None:
    option = planned(published["Llama-3.1-8B"], "g6e.xlarge", "fp8")
    assert option.tokens_s is not None
    assert option.usd_per_million == pytest.approx(1.861 / (option.tokens_s * 3600) * 1e6)


def test_half_the_price_is_half_the_cost(published: dict[str, ModelShape]) -> None:
    shape, row = published["Llama-3.1-8B"], hardware.find("g6e.xlarge")
    costs = [
        options(shape, [row.priced(price)], [PRECISIONS["fp8"]], workload=Workload())[0].usd_per_million
        for price in (2.0, 1.0)
    ]
    assert costs[0] is not None
    assert costs[1] == pytest.approx(costs[0] / 2)


def test_more_requests_than_fit_need_more_instances(published: dict[str, ModelShape]) -> None:
    one = planned(published["Llama-3.1-8B"], "g6e.xlarge", "fp16", workload=Workload(concurrency=8))
    many = planned(published["Llama-3.1-8B"], "g6e.xlarge", "fp16", workload=Workload(concurrency=1000))
    assert (one.instances, one.batch) == (1, 8)
    assert many.instances == -(-1000 // many.batch) > 1


def test_one_client_has_the_rate_of_one_replica(published: dict[str, ModelShape]) -> None:
    option = planned(published["Llama-3.1-8B"], "p5.48xlarge", "fp8", workload=Workload(concurrency=1))
    assert option.prediction is not None
    assert option.tokens_s == pytest.approx(option.prediction.tokens_s)
    assert option.tensor_parallel > 1  # which others leave idle, so they speed it up


def test_requests_in_flight_are_never_more_than_asked(published: dict[str, ModelShape]) -> None:
    for concurrency in (3, 9, 100, 1001):
        option = planned(published["Llama-3.1-8B"], "p4d.24xlarge", "int8", workload=Workload(concurrency=concurrency))
        assert option.used * option.batch * option.replicas * option.instances == pytest.approx(concurrency)


def test_few_requests_on_a_large_instance_cost_more(published: dict[str, ModelShape]) -> None:
    few = planned(published["Llama-3.1-8B"], "p5.48xlarge", "fp8", workload=Workload(concurrency=8))
    full = planned(published["Llama-3.1-8B"], "p5.48xlarge", "fp8")
    assert (few.usd_per_million or 0) > 10 * (full.usd_per_million or 0) > 0


def test_an_unknown_price_is_no_price(published: dict[str, ModelShape]) -> None:
    assert planned(published["Llama-3.1-8B"], "p5e.48xlarge", "fp8").usd_per_million is None


def test_the_best_is_the_cheapest_that_fits(published: dict[str, ModelShape]) -> None:
    found = planned_all(
        published["Llama-3.1-8B"], ["g4dn.xlarge", "g6e.xlarge", "p5.48xlarge", "p5e.48xlarge"], ["fp16", "fp8"]
    )
    chosen = best(found)
    assert chosen is not None
    assert chosen.usd_per_million == pytest.approx(
        min(option.usd_per_million for option in found if option.usd_per_million), rel=0.02
    )


def test_of_two_precisions_as_good_as_each_other_the_wider_is_best(published: dict[str, ModelShape]) -> None:
    for order in (["fp8", "int8"], ["int8", "fp8"]):
        chosen = best(planned_all(published["Llama-3.1-8B"], ["p5en.48xlarge"], order))
        assert chosen is not None
        assert chosen.precision.name == order[0]


def test_what_is_free_is_best(published: dict[str, ModelShape]) -> None:
    rows = [hardware.find("c7i.8xlarge").priced(0), hardware.find("p5.48xlarge")]
    found = options(published["Llama-3.1-8B"], rows, list(PRECISIONS.values()), workload=Workload())
    chosen = best(found)
    assert chosen is not None
    assert (chosen.hardware.name, chosen.usd_per_million) == ("c7i.8xlarge", 0)


def test_of_what_is_free_the_fastest_is_best(published: dict[str, ModelShape]) -> None:
    rows = [hardware.find(name).priced(0) for name in ("m7i.8xlarge", "c7i.24xlarge")]
    found = options(published["Llama-3.1-8B"], rows, list(PRECISIONS.values()), workload=Workload())
    chosen = best(found)
    assert chosen is not None
    assert chosen.hardware.name == "c7i.24xlarge"
    assert chosen.tokens_s == pytest.approx(max(option.tokens_s for option in found if option.tokens_s), rel=0.02)


def test_without_prices_the_best_is_the_fastest_for_its_devices(published: dict[str, ModelShape]) -> None:
    chosen = best(planned_all(published["Llama-3.1-8B"], ["L4", "H100", "8xA100"], ["fp16"]))
    assert chosen is not None
    assert chosen.hardware.name == "H100"


def test_nothing_that_fits_has_no_best() -> None:
    assert best(planned_all(read("405B"), ["T4", "L4"], ["fp16"])) is None


def test_where_nothing_computes_only_the_memory_is_planned(published: dict[str, ModelShape]) -> None:
    option = planned(published["Llama-3.1-70B"], "inf2.48xlarge", "fp16")
    assert option.fits
    assert option.prediction is option.tokens_s is option.usd_per_million is None
    assert best([option]) is None


def test_a_given_tensor_parallelism_is_kept(published: dict[str, ModelShape]) -> None:
    assert planned(published["Llama-3.1-8B"], "p5.48xlarge", "fp8", tensor_parallel=4).tensor_parallel == 4


def test_more_ranks_than_devices_do_not_fit(published: dict[str, ModelShape]) -> None:
    option = planned(published["Llama-3.1-8B"], "p5.4xlarge", "fp8", tensor_parallel=4)
    assert option.reason == "p5.4xlarge has 1 device, not 4"


def test_ranks_that_do_not_divide_the_heads_are_an_error(published: dict[str, ModelShape]) -> None:
    with pytest.raises(SettingsError, match="32 attention heads cannot be divided among 3 devices"):
        planned(published["Llama-3.1-8B"], "p5.48xlarge", "fp8", tensor_parallel=3)


def test_a_request_longer_than_the_model_allows_is_an_error(demo_model: Any) -> None:
    with pytest.raises(SettingsError, match="longer than the 1,024 of the model"):
        planned(read(str(demo_model)), "T4", "fp16")
