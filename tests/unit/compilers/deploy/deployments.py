"""The deployments that the tests and the golden files are of: one of each thing that can be served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmopt.compilers.deploy.base import Deployment

ENGINE = Deployment(
    name="llama",
    runtime="tensorrt-llm",
    version="0.21.0rc1",
    mode="engine",
    model="engine",
    url="s3://bucket/llama-w8a8",
    dtype="float16",
    quantization="W8A8_SQ_PER_CHANNEL",
    tensor_parallel=4,
    max_batch_size=64,
    max_input_len=2048,
    max_seq_len=4096,
    max_num_tokens=16384,
    gpu_memory_fraction=0.9,
    block_reuse=True,
    architecture="sm_86",
    instance="ml.g5.12xlarge",
    loading_timeout_s=2400,
    lmi={"job_queue_size": "500", "option.output_formatter": "jsonlines"},
)
BUNDLE = Deployment(
    name="llama",
    runtime="tensorrt-llm",
    version="1.2.1",
    mode="bundle",
    model="model",
    url="s3://bucket/llama-fp8",
    dtype="bfloat16",
    quantization="FP8",
    kv_cache="fp8",
    tensor_parallel=2,
    max_batch_size=64,
    max_input_len=4096,
    max_seq_len=8192,
    max_num_tokens=8192,
    gpu_memory_fraction=0.85,
    chunked_prefill=True,
    architecture="sm_90",
)
VLLM = Deployment(
    name="llama",
    runtime="vllm",
    version="0.20.1",
    mode="bundle",
    model="model",
    url="s3://bucket/llama-w4a16",
    dtype="bfloat16",
    tensor_parallel=2,
    max_batch_size=128,
    max_seq_len=8192,
    max_num_tokens=4096,
    gpu_memory_fraction=0.9,
    block_reuse=True,
    instance="ml.g5.12xlarge",
    serve={"enforce_eager": False, "speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
)
#: Of a TensorRT-LLM that tritonserver has too.
NEWER_ENGINE = replace(ENGINE, version="1.2.1", url=None, instance=None, lmi={})
CASES: Mapping[str, Deployment] = {"engine": ENGINE, "newer-engine": NEWER_ENGINE, "bundle": BUNDLE, "vllm": VLLM}
