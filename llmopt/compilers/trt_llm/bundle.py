"""Bundle mode: a checkpoint that `trtllm-serve` loads as it is: plain, in ModelOpt's format, or FP8 in blocks.

Our other formats are converted where that loses nothing. What is loaded, from NVIDIA/TensorRT-LLM: the model table of
docs/source/models/supported-models.md (1.0.0 to 1.3.0rc15), the linears of tensorrt_llm/_torch/modules/linear.py
(`get_quant_method`), the experts of modules/fused_moe/fused_moe_cutlass.py (1.2 and 1.3.0rc).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.artifacts.outcome import Progress
from llmopt.compilers.hub_model import check_split, check_tokenizer_files, copy_model
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.errors import LlmoptError, SettingsError
from llmopt.models.companions import read_json, write_json

if TYPE_CHECKING:
    from llmopt.formats.reading import Source
    from llmopt.formats.scheme import Scheme

#: Model types that the PyTorch backend has.
FAMILIES = ("gemma3_text", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")

#: Of the algorithms that we can read, those that it loads; and those that experts can have.
LOADED = ("FP8", "FP8_BLOCK_SCALES", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ", "W8A16")
LOADED_EXPERTS = ("FP8", "FP8_BLOCK_SCALES", "W8A16")

_QUANTIZATION = "hf_quant_config.json"
#: Source: tensorrt_llm/_torch/attention_backend/trtllm.py (1.2 and 1.3.0rc), `kv_cache_scaling_factor`.
_CACHE_SCALES = (
    "TensorRT-LLM's PyTorch backend has an FP8 KV cache with a scale of 1: the checkpoint's scales are in the bundle "
    "and stay unused (engines use them)"
)
_DTYPES = {"float16": "F16", "bfloat16": "BF16"}


def check(model: Path, settings: Settings) -> None:
    """Raise LlmoptError for what `trtllm-serve` would not load, or could not split; reads headers and scales."""
    source = _open(model, settings)
    _check_quantization(source)
    check_split(source, settings.tensor_parallel, settings.pipeline_parallel)


def write(model: Path, out: Path, settings: Settings, progress: Progress) -> tuple[str, ...]:
    """Write the checkpoint with its tokenizer into the empty folder `out`, a file or a block at a time.

    Returns what changes numbers: not here, but in the server.
    """
    from llmopt.formats.convert import convert

    source = _open(model, settings)
    _check_quantization(source)
    if _is_converted(source):
        convert(model, "modelopt", out, progress)
    else:
        copy_model(source.checkpoint, out, progress)
    write_json(out / "config.json", _older_names(read_json(out / "config.json")))
    said = read_json(out / _QUANTIZATION).get("quantization", {})
    if said.get("quant_algo") == "MIXED_PRECISION":
        write_json(out / "quant_cfg.json", said)  # where TensorRT-LLM up to 1.2 looks for the layers' algorithms
    cache = "none" if source.reader is None else source.reader.encoding.kv_cache
    return (_CACHE_SCALES,) if cache == "fp8" else ()


def algorithm(source: Source) -> str | None:
    """The `quant_algo` of a checkpoint that `check` passed, as its bundle will have it; None where it is plain."""
    from llmopt.formats.reading import linears

    if source.reader is None:
        return None
    schemes = [source.reader.scheme(prefix) for prefix in linears(source.config)]
    used = {replace(scheme, symmetric=True) for scheme in schemes if scheme is not None}
    return _algorithm(used.pop()) if len(used) == 1 else "MIXED_PRECISION" if used else None


def _open(model: Path, settings: Settings) -> Source:
    """The checkpoint checked for what does not hang on its quantization."""
    from llmopt.formats.reading import open_model

    source = open_model(model)
    name, dtype = source.config.family.model_type, source.config.dtype
    if name not in FAMILIES:
        raise LlmoptError(
            f"TensorRT-LLM's PyTorch backend has no model of the type `{name}`",
            hint="it has " + ", ".join(f"`{each}`" for each in FAMILIES) + "; `--target vllm` may serve this one",
        )
    check_tokenizer_files(model)
    if dtype not in _DTYPES.values():
        raise LlmoptError(
            f"a bundle serves the checkpoint in its own dtype, and `{dtype}` is none that TensorRT-LLM computes in",
            hint="cast the weights to bfloat16 first",
        )
    if settings.dtype != "auto" and _DTYPES[settings.dtype] != dtype:
        raise SettingsError(
            f"`compile.dtype` cannot be `{settings.dtype}`: a bundle serves the checkpoint in its own dtype, {dtype}",
            hint="`auto`, or `mode: engine`, which casts",
        )
    if settings.kv_cache == "none" and source.reader is not None and source.reader.encoding.kv_cache != "none":
        raise SettingsError(
            f"`compile.kv_cache` cannot be `none`: the server takes what the checkpoint says, "
            f"`{source.reader.encoding.kv_cache}`",
            hint="`auto`, or `mode: engine`, or quantize without `--kv-cache`",
        )
    return source


def _is_converted(source: Source) -> bool:
    """Whether it has to be encoded anew: another format, or ModelOpt's without what TensorRT-LLM asks for."""
    reader, checkpoint = source.reader, source.checkpoint
    if reader is None:
        return False
    said = checkpoint.config["quantization_config"]
    if said.get("quant_method") == "fp8" and said.get("weight_block_size"):
        return False  # DeepSeek's blocks, which it loads as they are (_torch/model_config.py, load_hf_quant_config)
    if said.get("quant_method") != "modelopt":
        return True
    if not (checkpoint.path / _QUANTIZATION).is_file():
        return True
    schemes = {prefix: reader.scheme(prefix) for prefix in _unfused(source)}
    fourbit = [prefix for prefix, scheme in schemes.items() if scheme is not None and scheme.bits == 4]
    return any(f"{prefix}.pre_quant_scale" not in checkpoint.tensors for prefix in fourbit)


def _unfused(source: Source) -> list[str]:
    """The linears that TensorRT-LLM does not fuse with others: it asks for `pre_quant_scale` in each of 4 bits."""
    config = source.config
    return [
        f"{config.block(index)}.{site.linears[0]}"
        for index in range(config.layers)
        for site in config.sites(index)
        if len(site.linears) == 1
    ]


def _check_quantization(source: Source) -> None:
    """LlmoptError unless the weights can be had in ModelOpt's format and every linear has a kernel there."""
    from llmopt.formats.convert import check_convert
    from llmopt.formats.reading import linears

    path, reader = source.checkpoint.path, source.reader
    if reader is None:
        return
    if _is_converted(source):
        try:
            check_convert(path, "modelopt")
        except LlmoptError as error:
            raise LlmoptError(
                f"`{path}` cannot become a bundle: {error.message}",
                hint=f"{error.hint}; a bundle holds 4-bit groups without zero points, 8-bit rows and FP8",
            ) from None
    for prefix in linears(source.config):
        scheme = reader.scheme(prefix)
        if scheme is not None:
            _check_algorithm(prefix, _algorithm(scheme))


def _algorithm(scheme: Scheme) -> str:
    """TensorRT-LLM's name of what it can hold; a zero point that is always the middle is none."""
    from llmopt.formats.modelopt import ALGORITHMS

    if scheme.kind == "float" and scheme.group_size > 0:
        return "FP8_BLOCK_SCALES"
    plain = replace(scheme, symmetric=True)
    return "W4A16_AWQ" if scheme.bits == 4 else next(name for name, other in ALGORITHMS.items() if other == plain)


def _check_algorithm(prefix: str, name: str) -> None:
    if name not in LOADED:
        raise LlmoptError(
            f"`{prefix}` is `{name}`, which TensorRT-LLM loads in engine mode only",
            hint="`mode: engine` with `version: 1.2.1`, or quantize to FP8 or to 4 bits",
        )
    if ".experts." in prefix and name not in LOADED_EXPERTS:
        raise LlmoptError(
            f"`{prefix}` is `{name}`, which TensorRT-LLM has no kernel for in experts",
            hint="quantize to FP8 (`--method fp8`), or serve with `--target vllm`",
        )


def _older_names(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with what transformers 5 calls otherwise said by its older names too.

    TensorRT-LLM up to 1.2 comes with transformers 4, which would pass over `rope_parameters` and take a base of 10000.
    """
    said = dict(config)
    if "dtype" in config:
        said.setdefault("torch_dtype", config["dtype"])
    rope = config.get("rope_parameters")
    if not rope:
        return said
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    said.setdefault("rope_theta", full.get("rope_theta", 10000.0))
    if local is not None:
        said.setdefault("rope_local_base_freq", local.get("rope_theta", 10000.0))
    if full.get("rope_type", "default") != "default":
        said.setdefault("rope_scaling", {key: value for key, value in full.items() if key != "rope_theta"})
    return said
