"""The target `vllm`: the checkpoint as it is, checked to the last value, with the files that start a server on it.

vLLM compiles when it loads, so there is nothing to compile ahead: the artifact stays `prepared`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from llmopt.artifacts.outcome import Json, Outcome, Progress
from llmopt.compilers import deploy
from llmopt.errors import LlmoptError, SettingsError
from llmopt.formats.scheme import Holds, KVCache, Scheme
from llmopt.models.companions import write_json
from llmopt.planner import hardware

if TYPE_CHECKING:
    from llmopt.compilers.deploy.base import Deployment
    from llmopt.formats.reading import Source

#: What vLLM loads, by `quant_method`. Source: vLLM's vllm/model_executor/layers/quantization (2026): compressed_tensors
#: (schemes WNA16, W8A8Int8, W8A8Fp8, W8A16Fp8), gptq_marlin (`TYPE_MAP`), awq, modelopt (`QUANT_ALGOS`), fp8.
LOADED: Mapping[str, tuple[Holds, ...]] = {
    "compressed-tensors": (
        Holds(bits=(4, 8)),
        Holds(bits=(8,), groups=("row",), symmetric=(True,), activations=("dynamic", "static")),
        Holds(
            bits=(8,),
            kind="float",
            groups=("row", "tensor", "group"),
            symmetric=(True,),
            activations=("none", "dynamic", "static"),
        ),
    ),
    "gptq": (Holds(bits=(4, 8), symmetric=(True,)),),
    "awq": (Holds(bits=(4,), groups=("group",)),),
    "modelopt": (
        Holds(bits=(8,), kind="float", groups=("tensor",), symmetric=(True,), activations=("static",)),
        Holds(bits=(8,), kind="float", groups=("row",), symmetric=(True,), activations=("dynamic",)),
    ),
    "fp8": (
        Holds(
            bits=(8,),
            kind="float",
            groups=("tensor", "row", "group"),
            symmetric=(True,),
            activations=("none", "dynamic", "static"),
        ),
    ),
}
#: In-features that share a scale, of integers: marlin_utils.py, MARLIN_SUPPORTED_GROUP_SIZES.
GROUP_SIZES = (-1, 32, 64, 128)
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class VLLM:
    """What a server is started with, by the names that the other targets have for it; serve: further arguments of
    `vllm serve`, by their long names. Lengths are in tokens, None: vLLM's own.
    """

    portable: ClassVar[bool] = True

    target: Literal["vllm"] = "vllm"
    aot: bool = True
    version: str = "0.32.0"
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    gpu: str | None = None
    kv_cache: Literal["auto", "fp8"] = "auto"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    max_batch_size: int = 256
    max_seq_len: int | None = None
    max_num_tokens: int | None = None
    serve: Mapping[str, Json] = field(default_factory=dict)
    emit: tuple[str, ...] = ()
    url: str | None = None
    instance: str | None = None
    image: str | None = None
    loading_timeout_s: int = 1800
    lmi: Mapping[str, str] = field(default_factory=dict)
    served_name: str = "model"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        deploy.check_names(self.emit)
        sizes = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "max_batch_size")
        for name in (*sizes, "max_seq_len", "max_num_tokens", "loading_timeout_s"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"`compile.{name}` cannot be `{value}`", hint="a whole number from 1 up")
        if self.gpu is not None:
            hardware.find(self.gpu)
        if not self.aot:
            raise SettingsError("`compile.aot` cannot be false for `vllm`", hint="it compiles when it loads, always")

    def deps(self) -> tuple[str, ...]:
        return ("numpy",)

    def check(self, model: Path) -> None:
        source = _read(model, self)
        deploy.emit(_emitters(self), _deployment(self, source))

    def compile(self, model: Path, out: Path, progress: Progress) -> Outcome:
        """Copy and check the checkpoint; `model/`, `deploy/` and engine.json."""
        from llmopt.compilers.hub_model import copy_model
        from llmopt.compilers.model_check import check_model

        source = _read(model, self)
        (out / "model").mkdir()
        copy_model(source.checkpoint, out / "model", progress)
        progress("validating what was written")
        report = check_model(out / "model", "checkpoint for vLLM", record=True)
        deploy.write(_emitters(self), _deployment(self, source), out)
        about = _describe(self, source)
        write_json(out / "engine.json", about)
        return Outcome(status="prepared", metrics={"runtime": "vLLM", **about, "validated": report.to_json()})


def _emitters(settings: VLLM) -> tuple[str, ...]:
    """Those asked for, and what starts vLLM itself."""
    return ("vllm", *(name for name in settings.emit if name != "vllm"))


def _read(model: Path, settings: VLLM) -> Source:
    """The checkpoint, checked for what vLLM would refuse or pass over; raises LlmoptError."""
    from llmopt.compilers.hub_model import check_split, check_tokenizer_files
    from llmopt.formats.reading import linears, open_model

    source = open_model(model)
    check_tokenizer_files(model)
    if source.reader is not None:
        method = str(source.checkpoint.config["quantization_config"].get("quant_method"))
        for prefix in linears(source.config):
            scheme = source.reader.scheme(prefix)
            if scheme is not None:
                _check_scheme(prefix, method, scheme)
        _check_kv_cache(source.reader.encoding.kv_cache)
    check_split(source, settings.tensor_parallel, settings.pipeline_parallel)
    positions = source.config.max_positions
    if settings.max_seq_len is not None and settings.max_seq_len > positions:
        raise LlmoptError(
            f"`max_seq_len: {settings.max_seq_len}` is over the {positions} positions of the model",
            hint=f"at most {positions}: prompt and answer together",
        )
    return source


def _check_scheme(prefix: str, method: str, scheme: Scheme) -> None:
    sharing = {-1: "row", 0: "tensor"}.get(scheme.group_size, "group")
    numbers = "FP8" if scheme.kind == "float" else f"{scheme.bits}-bit"
    if not any(
        scheme.bits in row.bits
        and scheme.kind == row.kind
        and sharing in row.groups
        and scheme.symmetric in row.symmetric
        and scheme.activations in row.activations
        for row in LOADED[method]
    ):
        zeros = "" if scheme.symmetric else " and zero points"
        inputs = "" if scheme.activations == "none" else f" and {scheme.activations} scales of the inputs"
        raise LlmoptError(
            f"vLLM does not load `{prefix}`: `{method}` with {numbers} weights, one scale a {sharing}{zeros}{inputs}",
            hint="`--format compressed-tensors` with 4 or 8 bits, W8A8 or FP8 is what it loads most of",
        )
    if scheme.kind == "int" and scheme.group_size not in GROUP_SIZES:
        sizes = ", ".join(str(size) for size in GROUP_SIZES if size > 0)
        raise LlmoptError(
            f"vLLM has no kernel for groups of {scheme.group_size}, which `{prefix}` has",
            hint=f"quantize with `--group-size` {sizes}, or -1 for one scale a row",
        )


def _check_kv_cache(kv_cache: KVCache) -> None:
    if kv_cache == "int8":
        raise LlmoptError(
            "vLLM has no INT8 KV cache, which the checkpoint has scales for", hint="quantize with `--kv-cache fp8`"
        )


def _deployment(settings: VLLM, source: Source) -> Deployment:
    from llmopt.compilers.deploy.base import Deployment

    return Deployment.of(
        settings,
        name=settings.served_name,
        runtime="vllm",
        mode="bundle",
        model="model",
        dtype=settings.dtype,
        quantization=_method(source),
        architecture=None if settings.gpu is None else hardware.find(settings.gpu).architecture,
        kv_cache=settings.kv_cache,
    )


def _method(source: Source) -> str | None:
    """`quant_method`, which is also what `--quantization` would be."""
    config = source.checkpoint.config.get("quantization_config")
    return None if config is None else str(config.get("quant_method"))


def _describe(settings: VLLM, source: Source) -> dict[str, Json]:
    """engine.json."""
    config = source.config
    stored = None if source.reader is None or source.reader.encoding.kv_cache == "none" else "FP8"
    return {
        "schema": "llmopt.engine/1",
        "target": "vllm",
        "status": "prepared",
        "mode": "bundle",
        "version": settings.version,
        "dtype": _DTYPES[config.dtype] if settings.dtype == "auto" else settings.dtype,
        "quant_algo": _method(source),
        "kv_cache": "FP8" if settings.kv_cache == "fp8" else stored,
        "gpu": settings.gpu,
        "architecture": None if settings.gpu is None else hardware.find(settings.gpu).architecture,
        "gpus": settings.tensor_parallel * settings.pipeline_parallel,
        "tensor_parallel": settings.tensor_parallel,
        "pipeline_parallel": settings.pipeline_parallel,
        "model_type": config.family.model_type,
        "vocab_size": config.vocab_size,
        "max_context_tokens": settings.max_seq_len or config.max_positions,
    }
