"""What an emitter is told, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from llmopt.artifacts.outcome import Json


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """What a serving stack has to know of an engine or a bundle. Sizes are in tokens and in sequences.

    name: of the model as clients ask for it, a DNS label. model: what the server is given, relative to the artifact's
    folder ("model" for a bundle, "engine" for engines that `build.sh` makes). url: where the artifact will lie
    (`s3://bucket/prefix`), None where the user has not said. quantization: TensorRT-LLM's `quant_algo`, or vLLM's
    `--quantization`, None where plain. serve: flags of the runtime beyond those named here, as the settings have them.
    """

    name: str
    runtime: Literal["tensorrt-llm", "vllm"]
    version: str
    mode: Literal["engine", "bundle"]
    model: str
    url: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    max_batch_size: int = 256
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int | None = None
    free_gpu_memory_fraction: float | None = None
    enable_block_reuse: bool = True
    chunked_prefill: bool = False
    trust_remote_code: bool = False
    gpu: str | None = None
    architecture: str | None = None  # "sm_90"; None: any that the numbers need
    instance: str | None = None  # of SageMaker or EC2: "ml.p5.48xlarge"
    serve: Mapping[str, Json] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


#: From a deployment to the text of files, by their path below `deploy/<name>/`.
Emitter: TypeAlias = Callable[[Deployment], Mapping[str, str]]
