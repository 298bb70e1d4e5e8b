from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.metrics import prometheus, telemetry
from llmopt.bench.metrics.telemetry import MissingError, Watch, merged, metrics_url, open_rapl, read_gpus, watching

VLLM = """\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 11215.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 8.0
vllm:num_requests_running{engine="1",model_name="meta-llama/Llama-3.1-8B-Instruct"} 7.0
vllm:num_requests_waiting{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="meta-llama/Llama-3.1-8B-Instruct"} 0.75
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="a \\"quoted\\" name, with } and {"} 2.0
vllm:num_preemptions_created{engine="0",model_name="x"} 1.7463e+09
vllm:prefix_cache_queries_total{engine="0",model_name="x"} 1.0e+03
vllm:prefix_cache_hits_total{engine="0",model_name="x"} 250.0
vllm:prompt_tokens_total{engine="0",model_name="x"} 1000.0
vllm:generation_tokens_total{engine="0",model_name="x"} 6400.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="x"} 10.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="x"} 90.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="x"} 100.0
"""
SGLANG = """\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{engine_type="unified",model_name="m",pp_rank="0",priority="",tp_rank="0"} 4.0
sglang:num_running_reqs{engine_type="unified",model_name="m",pp_rank="0",priority="1",tp_rank="0"} 4.0
sglang:num_running_reqs{engine_type="unified",model_name="m",pp_rank="0",priority="",tp_rank="1"} 4.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 2.0
sglang:token_usage{model_name="m",tp_rank="0"} 0.28
sglang:prompt_tokens_total{model_name="m"} 8128902.0
sglang:cached_tokens_total{model_name="m"} 4064451.0
sglang:generation_tokens_total{model_name="m"} 7557572.0
"""
TGI = """\
# TYPE tgi_request_success counter
tgi_request_success{kind="async"} 44
# TYPE tgi_batch_current_size gauge
tgi_batch_current_size 4
tgi_queue_size 7
tgi_request_input_length_sum 5120
tgi_request_generated_tokens_sum 8123
tgi_request_generated_tokens_count 44
"""
TRITON = """\
# HELP nv_trt_llm_request_metrics TRT LLM request metrics
# TYPE nv_trt_llm_request_metrics gauge
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 6
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 1
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6239
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} 0.0513
nv_gpu_power_usage{gpu_uuid="GPU-1"} 61.2
nv_gpu_power_usage{gpu_uuid="GPU-2"} 60.8
nv_energy_consumption{gpu_uuid="GPU-1"} 1234.5
nv_gpu_utilization{gpu_uuid="GPU-1"} 0.9
"""


def test_vllm_is_read_over_its_engines() -> None:
    assert prometheus.read(VLLM) == {
        "running": 15, "waiting": 3, "kv_cache_share": 0.75, "preemptions": 2, "prefix_cache_queries": 1000,
        "prefix_cache_hits": 250, "prompt_tokens": 1000, "generation_tokens": 6400, "requests": 100,
    }  # fmt: skip


def test_workers_and_priorities_of_sglang_are_not_counted_twice() -> None:
    found = prometheus.read(SGLANG)
    assert (found["running"], found["waiting"], found["kv_cache_share"]) == (4, 2, 0.28)
    assert (found["prefix_cache_hits"], found["prefix_cache_queries"]) == (4064451, 8128902)


def test_tgi_and_triton_are_read() -> None:
    assert prometheus.read(TGI) == {
        "running": 4, "waiting": 7, "requests": 44, "prompt_tokens": 5120, "generation_tokens": 8123
    }  # fmt: skip
    assert prometheus.read(TRITON) == {
        "running": 6, "waiting": 1, "kv_cache_share": 0.0513, "gpu_power_w": 122.0, "gpu_energy_j": 1234.5,
        "gpu_share": 0.9,
    }  # fmt: skip


def test_values_that_are_no_numbers_are_passed_over() -> None:
    assert prometheus.read("tgi_queue_size NaN\ntgi_batch_current_size +Inf\ntgi_queue_size{a=} x\n") == {}
    assert prometheus.read("tgi_queue_size 7 1763750000000\n") == {"waiting": 7}


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    prometheus.read(text + "\ntgi_queue_size{" + text)


def test_gauges_have_their_range_and_counters_their_growth() -> None:
    watch = Watch()
    for waiting, preemptions in ((0, 10), (4, 12), (2, 15)):
        watch.add({"waiting": waiting, "preemptions": preemptions})
    found = watch.result()
    assert found["waiting"] == {"mean": 2, "min": 0, "max": 4}
    assert found["preemptions"] == 5


def test_a_counter_that_fell_has_begun_anew() -> None:
    watch = Watch()
    for count in (10, 14, 3):
        watch.add({"requests": count})
    assert watch.result()["requests"] == 7


def test_the_hit_share_is_of_the_load_alone() -> None:
    watch = Watch()
    watch.add({"prefix_cache_queries": 1000, "prefix_cache_hits": 0})
    watch.add({"prefix_cache_queries": 1100, "prefix_cache_hits": 80})
    assert watch.result()["prefix_cache_hit_share"] == 0.8


def test_rounds_merge_by_their_samples_and_sums() -> None:
    one, two = Watch(), Watch()
    for waiting in (0, 0, 0):
        one.add({"waiting": waiting, "requests": 5 * waiting})
    two.add({"waiting": 8, "requests": 1})
    two.counters["requests"] = 9.0
    found: Any = merged([one.result(), two.result()])
    assert found["waiting"] == {"mean": 2, "min": 0, "max": 8}
    assert (found["requests"], found["samples"]) == (9, 4)
    assert merged([one.result(), None]) is None
    assert merged([one.result()]) == one.result()


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serve each of these texts in turn, the last for good; an int is a status."""
    servers: list[HTTPServer] = []

    def start(*texts: str | int) -> str:
        left = list(texts)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(text if isinstance(text, int) else 200)
                self.end_headers()
                self.wfile.write(b"" if isinstance(text, int) else text.encode())

            def log_message(self, *args: object) -> None: ...

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/metrics"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_is_asked_before_during_and_after(serve: Callable[..., str]) -> None:
    url = serve(*(TGI.replace("size 7", f"size {size}") for size in (0, 5)), TGI.replace('async"} 44', 'async"} 54'))
    with watching([url], machine=False, interval_s=0.05) as watch:
        deadline_s = time.monotonic() + 10
        while watch.samples < 3 and time.monotonic() < deadline_s:
            time.sleep(0.01)
    found: Any = watch.result()
    assert found["samples"] >= 4
    assert (found["waiting"]["min"], found["waiting"]["max"], found["requests"]) == (0, 7, 10)


def test_servers_that_share_a_load_are_one(serve: Callable[..., str]) -> None:
    with watching([serve(TGI), serve(TGI)], machine=False) as watch:
        pass
    found: Any = watch.result()
    assert found["running"]["max"] == 8


@pytest.mark.parametrize(("text", "why"), [(404, "HTTP 404"), ("<html>", "no metric that is known here")])
def test_a_server_without_metrics_is_asked_once_and_said(serve: Callable[..., str], text: Any, why: str) -> None:
    with watching([serve(text, TGI)], machine=False, interval_s=0.01) as watch:
        time.sleep(0.05)
    assert watch.result() == {"samples": 0, "missing": {"metrics": why}, "energy_j": None}


def test_a_server_that_is_not_there_is_said() -> None:
    with watching(["http://127.0.0.1:9/metrics"], machine=False) as watch:
        pass
    assert "cannot be read" in watch.missing["metrics"]


def test_what_the_machine_does_not_tell_is_missing_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_gpus() -> Any:
        raise MissingError("no GPU")

    monkeypatch.setattr(telemetry, "open_gpus", no_gpus)
    monkeypatch.setattr(telemetry, "open_rapl", lambda: open_rapl(tmp_path))
    with watching([], machine=True) as watch:
        pass
    assert watch.result()["missing"] == {"gpu": "no GPU", "cpu_energy": "this machine has no RAPL counters"}


def test_the_energy_of_cpus_is_summed_over_packages_and_past_their_range(tmp_path: Path) -> None:
    counters = []
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
        counters.append(tmp_path / name / "energy_uj")
        counters[-1].write_text("9000000\n")
    source = open_rapl(tmp_path)
    counters[0].write_text("9500000\n")
    counters[1].write_text("1000000\n")
    counters[2].write_text("9900000\n")
    assert source() == {"cpu_energy_j": 2.5}


class NvmlError(Exception):
    pass


def unknown(gpu: int) -> float:
    raise NvmlError("Not Supported")


NVML = SimpleNamespace(
    NVMLError=NvmlError,
    NVML_TEMPERATURE_GPU=0,
    nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=(gpu + 1) << 30),
    nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=40 * (gpu + 1)),
    nvmlDeviceGetPowerUsage=lambda gpu: 100_000,
    nvmlDeviceGetTemperature=lambda gpu, sensor: 50 + gpu,
    nvmlDeviceGetTotalEnergyConsumption=unknown,
)


def test_gpus_are_read_together_and_what_they_do_not_know_is_left_out() -> None:
    assert read_gpus(NVML, [0, 1]) == {
        "gpu_memory_bytes": 3 << 30, "gpu_share": 0.8, "gpu_power_w": 200, "gpu_temperature_c": 51
    }  # fmt: skip


def test_where_metrics_are() -> None:
    assert metrics_url("https://host:8000/v1", "chat") == "https://host:8000/metrics"
    assert metrics_url("http://host:8000", "triton") == "http://host:8002/metrics"
