"""What can be wrong with the settings of the target `tensorrt-llm`, alone, together, and with a checkpoint and a GPU.

`check_settings(settings)` needs nothing else and is called when they are made. `check(settings, quant_algo=...,
kv_cache=..., architecture=...)` is called when the checkpoint is known: `quant_algo` and `kv_cache` are TensorRT-LLM's
`quant_algo` and `kv_cache_quant_algo` (None: plain), `architecture` is "sm_90" or None. Both raise SettingsError.
`has_paged_context` says what the builder will make of the attention.

Many of these TensorRT-LLM does not refuse: it turns the option off and says so in a log that nobody reads. Where a
rule's source is not in versions.yaml beside its option, it is named at the rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from llmopt.compilers.trt_llm import options, versions
from llmopt.compilers.trt_llm.versions import Mode, Numbers, Version
from llmopt.errors import SettingsError, nearest
from llmopt.planner import hardware

if TYPE_CHECKING:
    from llmopt.compilers.trt_llm.settings import Settings

#: What is wrong, and what to do about it.
Fault: TypeAlias = tuple[str, str]

_SIZES = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_beam_width")
_PARALLEL = ("tensor_parallel", "pipeline_parallel", "expert_parallel")
_MOST_BEAMS = 256  # release notes of 0.15
_BLOCKS = (8, 16, 32, 64, 128)  # tokens a block of the paged KV cache (gpt-attention.md, XQA)
_FP8_ATTENTION = ("FP8", "W4A8_AWQ", "NVFP4")  # weights that FP8 context attention goes with (builder.py)
#: Drafting that finds its tokens without a second model or heads; the others need what is not prepared here.
_DRAFT_FREE_BUILDS = ("draft_tokens_external", "lookahead_decoding")
_WITH_DRAFT_MODEL = ("Eagle", "Eagle3", "DraftTarget", "Draft_Target")
_WITH_LENGTH = (*_WITH_DRAFT_MODEL, "NGram")


def check_settings(settings: Settings) -> None:
    """Raise SettingsError for the first thing that is wrong without a look at the checkpoint."""
    version = _check_version(settings)
    mode = version.modes[0] if settings.mode == "auto" else settings.mode
    _check_numbers(settings)
    _check_gpu(settings)
    options.check("build", settings.build, version, mode)
    options.check("serve", settings.serve, version, mode)
    _raise_first(_faults(settings))
    _raise_first(_drafting_faults(settings, version, mode))
    _raise_first(_engine_faults(settings) if mode == "engine" else _bundle_faults(settings))


def check(settings: Settings, *, quant_algo: str | None, kv_cache: str | None, architecture: str | None) -> None:
    """Raise SettingsError where the numbers do not run on the GPU in this mode, or the options do not go with them."""
    table, mode = versions.table(), settings.resolved_mode
    numbers = (_numbers(table.algorithms, quant_algo), _numbers(table.kv_cache, kv_cache))
    for kind in numbers:
        _check_arithmetic(kind, mode, architecture)
    if mode == "engine":
        _raise_first(_attention_faults(settings, quant_algo, kv_cache))
        capability = None if architecture is None else _capability(architecture)
        _raise_first(_plugin_faults(settings, quant_algo, capability))


def has_paged_context(settings: Settings, *, quant_algo: str | None, kv_cache: str | None) -> bool:
    """Whether the engines will have paged context attention, without which no block of the KV cache can be reused."""
    off = is_on(settings, "context_fmha") is False or is_on(settings, "use_paged_context_fmha") is False
    return not off and _unpaged_by_the_cache(quant_algo, kv_cache) is None


def is_on(settings: Settings, name: str) -> bool | None:
    """What `build` says of an `enable`/`disable` option; None where it says nothing."""
    value = settings.build.get(name)
    return None if value is None else value in (True, "enable")


def _raise_first(faults: Iterator[Fault]) -> None:
    for message, hint in faults:
        raise SettingsError(message, hint=hint)


def _check_version(settings: Settings) -> Version:
    if settings.mode == "engine" and versions.is_past_the_builder(settings.version):
        raise SettingsError(
            f"TensorRT-LLM `{settings.version}` has no engine builder: it was removed after {versions.LAST_BUILDER}",
            hint=f"`mode: bundle` serves the checkpoint without one, or `version: {versions.LAST_RELEASE_WITH_ENGINES}`"
            " is the last release that builds engines",
        )
    version = versions.find(settings.version)
    if settings.mode != "auto" and settings.mode not in version.modes:
        raise SettingsError(
            f"`mode: {settings.mode}` is not prepared for TensorRT-LLM `{version.name}`",
            hint=f"use `mode: {version.modes[0]}`, or `version: {versions.LAST_RELEASE_WITH_ENGINES}`, which has both",
        )
    return version


def _check_numbers(settings: Settings) -> None:
    for name in _SIZES + _PARALLEL:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise SettingsError(f"`compile.{name}` cannot be `{value}`", hint="a whole number from 1 up")
    if settings.tensor_parallel % settings.expert_parallel:
        raise SettingsError(
            f"`expert_parallel: {settings.expert_parallel}` does not divide "
            f"`tensor_parallel: {settings.tensor_parallel}`",
            hint="experts are spread over the GPUs of tensor parallelism: a divisor of it",
        )


def _check_gpu(settings: Settings) -> None:
    """The GPU is a row of the hardware table, one that TensorRT-LLM supports, and there are enough of it."""
    if settings.gpu is None:
        return
    row = hardware.find(settings.gpu)
    if row.architecture is None:
        raise SettingsError(f"`{row.name}` has no NVIDIA GPU", hint="name one, such as `gpu: H100`")
    plain = versions.table().algorithms["none"]
    if not plain.runs_on(_capability(row.architecture), settings.resolved_mode):
        raise SettingsError(
            f"TensorRT-LLM does not support `{row.name}` (`{row.architecture}`)",
            hint=f"its support matrix has {_ranges(plain, settings.resolved_mode)}",
        )
    if 1 < row.devices < settings.gpus:
        raise SettingsError(
            f"`{row.name}` has {row.devices} GPUs, and tensor times pipeline parallelism is {settings.gpus}",
            hint="lower `tensor_parallel` or `pipeline_parallel`",
        )


def _field(settings: Settings, group: str, name: str) -> Any:
    """What `serve` says of a field of an object, None where it says nothing."""
    values = settings.serve.get(group)
    return values.get(name) if isinstance(values, dict) else None


def _chunked(settings: Settings) -> bool:
    return settings.serve.get("enable_chunked_prefill") is True


def _faults(settings: Settings) -> Iterator[Fault]:
    """Those of both modes."""
    prompt, both = settings.max_input_len, settings.max_seq_len
    if prompt is not None and both is not None and prompt > both:  # builder.py clips it, or asserts
        yield (
            f"`max_input_len: {settings.max_input_len}` is over `max_seq_len: {settings.max_seq_len}`",
            "`max_seq_len` counts the prompt and the answer: raise it, or lower `max_input_len`",
        )
    if settings.max_beam_width > _MOST_BEAMS:
        yield f"`max_beam_width` cannot be `{settings.max_beam_width}`", f"at most {_MOST_BEAMS}"
    step = settings.max_batch_size * settings.max_beam_width
    if step > settings.max_num_tokens:  # llm_args.py warns; a full batch would wait for itself
        yield (
            f"`max_num_tokens: {settings.max_num_tokens}` does not hold one token of each of {step} sequences",
            f"raise it to at least {step}, or lower `max_batch_size` (times `max_beam_width`)",
        )
    if prompt is not None and prompt > settings.max_num_tokens and not _chunked(settings):
        yield (
            f"a prompt of `max_input_len: {settings.max_input_len}` does not fit a pass of "
            f"`max_num_tokens: {settings.max_num_tokens}`",
            "raise `max_num_tokens`, or set `serve: {enable_chunked_prefill: true}`",
        )
    if settings.max_beam_width > 1 and _field(settings, "kv_cache_config", "max_attention_window"):
        yield (  # gpt-attention.md: the prompt's cache is shared by the beams
            "`kv_cache_config.max_attention_window` does not go with beam search",
            "set `max_beam_width: 1`, or leave the window to the model",
        )


def _drafting_faults(settings: Settings, version: Version, mode: Mode) -> Iterator[Fault]:
    """Speculative decoding, in `serve.speculative_config`."""
    group = settings.serve.get("speculative_config")
    if not isinstance(group, dict):
        return
    kind = group.get("decoding_type")
    if kind is None:
        yield "`compile.serve.speculative_config` needs `decoding_type`", "such as `decoding_type: NGram`"
    if kind == "DraftTarget" and version.at_least("1.3.0rc0"):
        yield f"TensorRT-LLM `{version.name}` has no `decoding_type: {kind}`", "it is `Draft_Target` there"
    if kind == "Medusa":
        yield "`decoding_type: Medusa` needs a checkpoint with draft heads, which none here has", "use another"
    if mode == "engine" and kind != "Lookahead":  # supports_backend of llm_args.py, here and below
        yield f"`decoding_type: {kind}` is for bundles only", "an engine has `Lookahead`"
    if mode == "bundle" and kind == "Lookahead":
        yield (
            "`decoding_type: Lookahead` is for engines only",
            "a bundle has `NGram`, which needs no second model either",
        )
    if kind in _WITH_LENGTH and "max_draft_len" not in group:
        yield f"`decoding_type: {kind}` needs `max_draft_len`", "such as `max_draft_len: 4`"
    if kind in _WITH_DRAFT_MODEL and "speculative_model_dir" not in group:
        yield (
            f"`decoding_type: {kind}` needs a draft model",
            "set `speculative_model_dir`, a path where the server runs",
        )
    if settings.max_beam_width > 1:
        yield "speculative decoding does not go with beam search", "set `max_beam_width: 1`"
    if mode == "bundle" and settings.pipeline_parallel > 1:  # feature-combination-matrix.md
        yield (
            "speculative decoding does not go with pipeline parallelism",
            "set `pipeline_parallel: 1`, and more `tensor_parallel`",
        )
    if mode == "engine" and settings.build.get("speculative_decoding_mode") != "lookahead_decoding":
        yield (
            "the engine is not built for `decoding_type: Lookahead`",
            "add `build: {speculative_decoding_mode: lookahead_decoding, max_draft_len: ...}`",
        )


def _bundle_faults(settings: Settings) -> Iterator[Fault]:
    if settings.kv_cache == "int8":
        yield "a bundle has no INT8 KV cache", "use `kv_cache: fp8`, or `mode: engine`"
    if _field(settings, "cuda_graph_config", "batch_sizes") and _field(settings, "cuda_graph_config", "max_batch_size"):
        yield (
            "`cuda_graph_config` has both `batch_sizes` and `max_batch_size`",
            "the sizes are made up to `max_batch_size` where they are not given: keep one",
        )


def _engine_faults(settings: Settings) -> Iterator[Fault]:
    """Rules of builder.py and commands/build.py, and of in-flight batching, by which `trtllm-serve` serves."""
    build = settings.build
    if is_on(settings, "remove_input_padding") is False:
        yield "`remove_input_padding: disable` rules out in-flight batching", "leave it out"
    if build.get("gpt_attention_plugin") == "disable":
        yield "`gpt_attention_plugin: disable` rules out the paged KV cache", "leave it out"
    if build.get("kv_cache_type", "paged") != "paged":
        yield f"`kv_cache_type: {build['kv_cache_type']}` rules out in-flight batching", "leave it out: it is `paged`"
    if build.get("tokens_per_block", _BLOCKS[0]) not in _BLOCKS:
        sizes = ", ".join(f"`{size}`" for size in _BLOCKS)
        yield f"`tokens_per_block` cannot be `{build['tokens_per_block']}`", f"one of {sizes}"
    yield from _context_attention_faults(settings)
    opt = build.get("opt_num_tokens")
    if opt is not None and is_on(settings, "multiple_profiles"):
        yield "`opt_num_tokens` does not go with `multiple_profiles`", "leave one of them out"
    if isinstance(opt, int) and opt > settings.max_num_tokens:
        yield f"`opt_num_tokens: {opt}` is over `max_num_tokens: {settings.max_num_tokens}`", "lower it"
    yield from _built_drafting_faults(settings)
    yield from _needs_faults(settings)
    if settings.serve.get("guided_decoding_backend") == "llguidance":  # llm_args.py
        yield "`guided_decoding_backend: llguidance` is for bundles only", "use `xgrammar`"
    workers = build.get("workers", 1)
    if isinstance(workers, int) and workers > settings.gpus:
        yield f"`workers: {workers}` is more than there are engines to build: {settings.gpus}", "lower it"


def _context_attention_faults(settings: Settings) -> Iterator[Fault]:
    wanted = [name for name in ("use_paged_context_fmha", "use_fp8_context_fmha") if is_on(settings, name)]
    if is_on(settings, "context_fmha") is False and wanted:
        yield f"`{wanted[0]}` needs `context_fmha`", "leave `context_fmha: disable` out"
    off = next((n for n in ("context_fmha", "use_paged_context_fmha") if is_on(settings, n) is False), None)
    if off is not None:
        yield from _needs_paged_attention(settings, f"`{off}: disable`")


def _needs_paged_attention(settings: Settings, why: str) -> Iterator[Fault]:
    """What asks for paged context attention where `why` turns it off."""
    if _chunked(settings):
        yield f"`enable_chunked_prefill` does not go with {why}", "a prompt is cut at blocks of the KV cache: drop one"
    if _field(settings, "kv_cache_config", "enable_block_reuse"):
        yield f"`enable_block_reuse` does not go with {why}", "the prompt must be able to read cached blocks: drop one"


def _built_drafting_faults(settings: Settings) -> Iterator[Fault]:
    build = settings.build
    drafting, length = build.get("speculative_decoding_mode"), build.get("max_draft_len")
    if drafting is not None and drafting not in _DRAFT_FREE_BUILDS:
        yield (
            f"`speculative_decoding_mode: {drafting}` needs a checkpoint with draft heads, which none here has",
            "use " + " or ".join(f"`{name}`" for name in _DRAFT_FREE_BUILDS),
        )
    if (drafting is None) != (length is None):
        yield "`speculative_decoding_mode` and `max_draft_len` go together", "give both, or neither"
    if length is not None and (build.get("gather_context_logits") or build.get("gather_all_token_logits")):
        yield "context logits cannot be gathered while drafting", "use `gather_generation_logits`"
    if drafting is not None and settings.max_beam_width > 1:
        yield "speculative decoding does not go with beam search", "set `max_beam_width: 1`"


def _needs_faults(settings: Settings) -> Iterator[Fault]:
    """One option that does nothing, or is overridden, without another."""
    build = settings.build
    if is_on(settings, "user_buffer") and not is_on(settings, "reduce_fusion"):
        yield "`user_buffer` needs `reduce_fusion`", "add `reduce_fusion: enable`"
    for name in ("reduce_fusion", "gemm_allreduce_plugin"):
        if build.get(name) not in (None, False, "disable") and settings.tensor_parallel == 1:
            yield f"`{name}` does nothing without tensor parallelism", "leave it out, or raise `tensor_parallel`"
    if is_on(settings, "pp_reduce_scatter") and settings.pipeline_parallel == 1:
        yield "`pp_reduce_scatter` does nothing without pipeline parallelism", "leave it out"
    for name in ("gemm_swiglu_plugin", "low_latency_gemm_swiglu_plugin"):
        if build.get(name) == "fp8" and is_on(settings, "use_fused_mlp") is False:
            yield f"`{name}` needs `use_fused_mlp`", "leave `use_fused_mlp: disable` out"
    with_lora = build.get("lora_plugin") not in (None, "disable")
    for name in ("dora_plugin", "lora_dir", "lora_ckpt_source", "lora_target_modules", "max_lora_rank"):
        if build.get(name) not in (None, False, "disable") and not with_lora:
            yield f"`{name}` does nothing without `lora_plugin`", "add `lora_plugin: auto`"
    for name in ("enable_lora", "lora_config"):
        if settings.serve.get(name) and not with_lora:
            yield f"`serve.{name}` needs engines with `lora_plugin`", "add `build: {lora_plugin: auto}`"
    if build.get("weight_streaming") and build.get("gemm_plugin", "disable") != "disable":
        yield "`weight_streaming` streams no weights that a plugin holds", "set `gemm_plugin: disable`"


def _numbers(rows: Mapping[str, Numbers], name: str | None) -> Numbers:
    key = name or "none"
    if key not in rows:
        raise SettingsError(f"TensorRT-LLM's `{key}` is not in the table of numbers", hint=nearest(key, rows))
    return rows[key]


def _check_arithmetic(kind: Numbers, mode: Mode, architecture: str | None) -> None:
    if mode not in kind.architectures:
        other = "bundle" if mode == "engine" else "engine"
        way = f"use `mode: {other}`" if other in kind.architectures else "quantize the model in another way"
        if other == "engine":
            way += f" with `version: {versions.LAST_RELEASE_WITH_ENGINES}`"
        raise SettingsError(f"TensorRT-LLM does not load {kind.words} (`{kind.name}`) in `mode: {mode}`", hint=way)
    if architecture is not None and not kind.runs_on(_capability(architecture), mode):
        raise SettingsError(
            f"`{architecture}` does not run {kind.words} (`{kind.name}`) in `mode: {mode}`",
            hint=f"{_ranges(kind, mode)} can: name such a GPU, or quantize the model in another way",
        )


def _attention_faults(settings: Settings, quant_algo: str | None, kv_cache: str | None) -> Iterator[Fault]:
    """`build()` of builder.py, "Logics to control paged_context_fmha and fp8_context_fmha"."""
    if is_on(settings, "use_fp8_context_fmha"):
        if quant_algo not in _FP8_ATTENTION:
            yield "`use_fp8_context_fmha` needs FP8 weights", "leave it out"
        elif kv_cache != "FP8" and is_on(settings, "use_paged_context_fmha") is not False:
            yield "`use_fp8_context_fmha` needs an FP8 KV cache", "set `kv_cache: fp8`, or leave it out"
    why = _unpaged_by_the_cache(quant_algo, kv_cache)
    if why is not None:
        if is_on(settings, "use_paged_context_fmha"):
            yield f"`use_paged_context_fmha` does not go with {why}", "leave it out, or set `kv_cache: none`"
        yield from _needs_paged_attention(settings, why)


def _unpaged_by_the_cache(quant_algo: str | None, kv_cache: str | None) -> str | None:
    """What of the numbers makes TensorRT-LLM turn paged context attention off; None where it stays on."""
    if kv_cache == "INT8":
        return "an INT8 KV cache"
    if kv_cache == "FP8" and quant_algo not in _FP8_ATTENTION:
        return "an FP8 KV cache under weights that are not FP8"
    return None


def _plugin_faults(settings: Settings, quant_algo: str | None, capability: int | None) -> Iterator[Fault]:
    """Plugins for one kind of weights, and `validate()` of plugin.py."""
    build = settings.build
    holders = {
        "gemm_swiglu_plugin": ("FP8", "FP8"),
        "low_latency_gemm_plugin": ("FP8", "FP8"),
        "low_latency_gemm_swiglu_plugin": ("FP8", "FP8"),
        "fp8_rowwise_gemm_plugin": ("FP8_PER_CHANNEL_PER_TOKEN", "FP8 weights with a scale a row"),
    }
    for name, (needed, words) in holders.items():
        if build.get(name) in (None, "disable"):
            continue
        if quant_algo != needed:
            yield f"`{name}` is for {words} only", "leave it out"
        if name == "gemm_swiglu_plugin" and capability not in (None, 90):
            yield f"`{name}` is for Hopper only", "leave it out"
        if capability == 100:
            yield f"`{name}` does not run on `sm_100`", "leave it out"
    for value, needed in (("fp8", "FP8"), ("nvfp4", "NVFP4")):
        if build.get("gemm_plugin") == value and quant_algo != needed:
            yield f"`gemm_plugin: {value}` needs {needed} weights", "use `gemm_plugin: auto`"
    if is_on(settings, "user_buffer") and quant_algo != "FP8":
        yield "`user_buffer` is for FP8 weights only", "leave it out"
    held = quant_algo is not None and quant_algo.startswith(("W4", "W8"))
    if build.get("weight_streaming") and held:
        yield f"`weight_streaming` streams no weights that a plugin holds, and `{quant_algo}` has such", "leave it out"


def _capability(architecture: str) -> int:
    """90 of "sm_90"; SettingsError for what is no architecture's name."""
    digits = architecture.removeprefix("sm_")
    if not digits.isdigit():
        raise SettingsError(f"`{architecture}` is no GPU architecture", hint="write it as `sm_90`")
    return int(digits)


def _ranges(kind: Numbers, mode: Mode) -> str:
    spans = [f"`sm_{a}`" if a == b else f"`sm_{a}` to `sm_{b}`" for a, b in kind.architectures[mode]]
    return " and ".join(spans)
