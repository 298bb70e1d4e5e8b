"""The settings of the target `tensorrt-llm`, checked against each other and against what the version knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmopt.artifacts.outcome import Json
from llmopt.compilers import deploy


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is prepared, and for which TensorRT-LLM and GPU.

    version: of TensorRT-LLM. mode: a checkpoint for `trtllm-build`, or one that `trtllm-serve` loads; auto: bundle
    where the version has it. dtype: of what is not quantized; auto: the checkpoint's. gpu: a name of the hardware
    table ("H100"), for its architecture and memory; None: any that has the arithmetic. kv_cache: auto: what the
    checkpoint has scales for. Lengths are in tokens. build: further options of `trtllm-build`, serve: of
    `trtllm-serve` and its YAML, by TensorRT-LLM's own names. emit: deployments to write; url: where the artifact will
    lie for them; instance: the cloud instance they ask for; image: a container of the user's in place of the one that
    the deployment knows; loading_timeout_s: until a server counts as not started; lmi: further properties of AWS's LMI.
    """

    target: Literal["tensorrt-llm"] = "tensorrt-llm"
    aot: bool = True
    version: str = "1.2.1"
    mode: Literal["auto", "engine", "bundle"] = "auto"
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    gpu: str | None = None
    kv_cache: Literal["auto", "none", "fp8", "int8"] = "auto"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    max_batch_size: int = 64
    max_input_len: int = 4096
    max_seq_len: int = 8192
    max_num_tokens: int = 8192
    max_beam_width: int = 1
    build: Mapping[str, Json] = field(default_factory=dict)
    serve: Mapping[str, Json] = field(default_factory=dict)
    emit: tuple[str, ...] = ()
    url: str | None = None
    instance: str | None = None
    image: str | None = None
    loading_timeout_s: int = 1800
    lmi: Mapping[str, str] = field(default_factory=dict)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        deploy.check_names(self.emit)
