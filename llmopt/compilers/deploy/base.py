"""What an emitter is told, and what it gives back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from llmopt.artifacts.outcome import Json
from llmopt.errors import SettingsError
from llmopt.planner import hardware

Runtime: TypeAlias = Literal["tensorrt-llm", "vllm"]

#: Where the runtimes themselves take what a Deployment has a field for: a path of keys in `serve` to the field.
#: TensorRT-LLM: `trtllm-serve` flags and LlmArgs of 0.21 to 1.2; vLLM: `vllm serve` arguments.
_NAMED: Mapping[Runtime, Mapping[tuple[str, ...], str]] = {
    "tensorrt-llm": {
        ("kv_cache_config", "free_gpu_memory_fraction"): "gpu_memory_fraction",
        ("kv_cache_free_gpu_memory_fraction",): "gpu_memory_fraction",
        ("kv_cache_config", "enable_block_reuse"): "block_reuse",
        ("enable_chunked_prefill",): "chunked_prefill",
    },
    "vllm": {
        ("gpu_memory_utilization",): "gpu_memory_fraction",
        ("enable_prefix_caching",): "block_reuse",
        ("enable_chunked_prefill",): "chunked_prefill",
        ("kv_cache_dtype",): "kv_cache",
    },
}
#: Until a server has loaded its model; LMI's own default (deployment_guide/configurations.md of djl-serving 0.36).
LOADING_TIMEOUT_S = 1800
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1035, which a Service's name has to be


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """What a serving stack has to know of an engine or a bundle. Sizes are in tokens and in sequences.

    name: of the model as clients ask for it, a DNS label. model: the folder that the server is given, with the
    tokenizer in it, relative to the artifact's folder ("model" for a bundle, "engine" for engines that `build.sh`
    makes). url: where the artifact will lie (`s3://bucket/prefix`), None where the user has not said. quantization:
    TensorRT-LLM's `quant_algo`, or vLLM's `--quantization`, None where plain; kv_cache: "fp8" or "int8", None where
    plain. gpu_memory_fraction: for the KV cache, of what is free once the model is loaded (TensorRT-LLM), or for
    everything, of all there is (vLLM). block_reuse and chunked_prefill: None is the runtime's own default. image: the
    user's container in place of the table's. lmi: properties of LMI beyond what the rest says. serve: flags of the
    runtime beyond those named here.
    """

    name: str
    runtime: Runtime
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
    max_beam_width: int = 1
    gpu_memory_fraction: float | None = None
    block_reuse: bool | None = None
    chunked_prefill: bool | None = None
    trust_remote_code: bool = False
    gpu: str | None = None
    architecture: str | None = None  # "sm_90"; None: any that the numbers need
    instance: str | None = None  # of SageMaker or EC2: "ml.p5.48xlarge"
    image: str | None = None
    loading_timeout_s: int = LOADING_TIMEOUT_S
    lmi: Mapping[str, str] = field(default_factory=dict)
    serve: Mapping[str, Json] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        settings: object,
        *,
        name: str,
        runtime: Runtime,
        mode: Literal["engine", "bundle"],
        model: str,
        dtype: str = "auto",
        quantization: str | None = None,
        architecture: str | None = None,
        kv_cache: str | None = None,
    ) -> Deployment:
        """From the settings of a target: every field that both have, and those that its `serve` says by other names.

        What is given here is what was found in the checkpoint, where the settings may say `auto`.
        """
        own = {"name", "runtime", "mode", "model", "dtype", "quantization", "architecture", "kv_cache", "serve"}
        names = [f.name for f in dataclasses.fields(cls) if f.name not in own]
        values: dict[str, Any] = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
        named, serve = _named(runtime, getattr(settings, "serve", {}))
        return cls(
            name=name,
            runtime=runtime,
            mode=mode,
            model=model,
            dtype=dtype,
            quantization=quantization,
            architecture=architecture,
            serve=serve,
            **({"kv_cache": None if kv_cache is None else kv_cache.lower()} | values | named),
        )

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def model_url(self) -> str | None:
        """Where the folder that the server is given will lie, with the slash that says that it is one."""
        return None if self.url is None else f"{self.url.rstrip('/')}/{self.model}/"


#: From a deployment to the text of files, by their path below `deploy/<name>/`.
Emitter: TypeAlias = Callable[[Deployment], Mapping[str, str]]


def require_url(deployment: Deployment, emitter: str) -> str:
    """Where the artifact will lie, without a slash at the end; SettingsError where that is not said or no S3 URL."""
    url = deployment.url
    if url is None or not url.startswith("s3://") or len(url.split("/")) < 4 or any(c.isspace() for c in url):
        said = "no `compile.url`" if url is None else f"`compile.url` cannot be `{url}`"
        raise SettingsError(
            f"`compile.emit: {emitter}` fetches the artifact from S3: {said}",
            hint="say where the artifact will lie: `url: s3://bucket/prefix`",
        )
    return url.rstrip("/")


def check_name(deployment: Deployment) -> None:
    """SettingsError unless clouds can call something by the model's name."""
    if not _LABEL.fullmatch(deployment.name):
        raise SettingsError(
            f"`compile.served_name: {deployment.name}` cannot name a deployment",
            hint="lower-case letters, digits and `-` between them, 63 at most",
        )


def check_instance(deployment: Deployment) -> None:
    """SettingsError where the instance is known and has too few GPUs, or GPUs that do not run what is prepared."""
    if deployment.instance is None:
        return
    try:
        found = hardware.find(deployment.instance.removeprefix("ml."))
    except SettingsError:
        return  # the table has not every instance there is
    gpus = found.devices if found.kind == "gpu" else 0
    if gpus < deployment.gpus:
        have = "no GPU" if gpus == 0 else "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise SettingsError(
            f"`compile.instance: {deployment.instance}` has {have}, and tensor times pipeline"
            f" parallelism asks for {deployment.gpus}",
            hint="name an instance with as many, or lower `tensor_parallel`",
        )
    # vLLM multiplies FP8 weights on older GPUs too, in 16 bits (its Marlin kernels).
    wants_fp8 = "FP8" in (deployment.quantization or "") or deployment.kv_cache == "fp8"
    if deployment.runtime == "tensorrt-llm" and wants_fp8 and "fp8" not in found.flops:
        raise SettingsError(
            f"`compile.instance: {deployment.instance}` has no FP8 arithmetic, which this model needs",
            hint="L4, L40S, H100 and later have it: `llmopt plan MODEL --precision fp8` lists the instances",
        )
    needed = deployment.architecture
    if needed is not None and found.architecture != needed:
        raise SettingsError(
            f"`compile.instance: {deployment.instance}` has GPUs of {found.architecture}, and what is"
            f" compiled is for {needed}",
            hint="engines run on the architecture they were built on: change `gpu` or `instance`",
        )


def _named(runtime: Runtime, serve: Mapping[str, Json]) -> tuple[dict[str, Any], dict[str, Json]]:
    """The fields that `serve` says, and what is left of it."""
    fields: dict[str, Any] = {}
    left: dict[str, Json] = {}
    for key, value in serve.items():
        if (key,) in _NAMED[runtime]:
            fields[_NAMED[runtime][key,]] = value
        elif isinstance(value, Mapping):
            rest: dict[str, Json] = {}
            for part, item in value.items():
                if (key, part) in _NAMED[runtime]:
                    fields[_NAMED[runtime][key, part]] = item
                else:
                    rest[part] = item
            if rest or not value:
                left[key] = rest
        else:
            left[key] = value
    return fields, left
