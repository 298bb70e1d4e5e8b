"""The exact commands of the target `tensorrt-llm`, and the files that hold them. Pure: from settings to text.

The folder of a prepared artifact: `checkpoint/` (engine mode) or `model/` (bundle mode), the tokenizer's files beside
`checkpoint/`, and what `files(settings)` gives, by name:

- `commands.json`, from `commands(settings)`: `{"build": [[argv...], ...], "serve": [argv...]}` with the placeholders of
  PLACEHOLDERS, `{prepared}` the artifact's folder. `build` is empty for a bundle.
- `build_config.json`, from `build_config(settings)`: the same build by the names of `BuildConfig`; engine mode only.
- `serve.yaml`, from `serve_yaml(settings)`: what `trtllm-serve` reads beside its flags.
- `build.sh` (engine mode), `serve.sh`, `health.sh`, from `scripts(settings)`: the same commands for a person and bash;
  they find everything beside themselves, so that the folder can be moved.

`build_command(settings, checkpoint, out, timing_cache)` and `serve_command(settings, model, ...)` give the argv alone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts.outcome import Json
from llmopt.compilers.trt_llm import rules, versions

if TYPE_CHECKING:
    from llmopt.compilers.trt_llm.settings import Settings

PLACEHOLDERS = ("{prepared}", "{checkpoint}", "{engine}", "{timing_cache}", "{model}", "{port}")
#: What the KV cache takes of the memory left beside the weights: TensorRT-LLM's own default. It is in the YAML because
#: a `kv_cache_config` there replaces the one that the flags make.
FREE_GPU_MEMORY_FRACTION = 0.9
_SCRIPTS = Path(__file__).with_name("scripts")
#: The flags that are fields of BuildConfig; what is in none of these lists is one of PluginConfig.
_BUILD_CONFIG_NAMES = (
    "opt_num_tokens",
    "kv_cache_type",
    "profiling_verbosity",
    "weight_sparsity",
    "weight_streaming",
    "enable_debug_output",
    "visualize_network",
    "monitor_memory",
    "gather_context_logits",
    "gather_generation_logits",
    "speculative_decoding_mode",
    "max_draft_len",
)
_LORA_NAMES = ("lora_dir", "lora_ckpt_source", "lora_target_modules", "max_lora_rank")
#: Of the command line only: BuildConfig has no such field.
_COMMAND_ONLY = ("workers", "log_level", "fast_build", "logits_dtype", "gather_all_token_logits")


def build_command(
    settings: Settings,
    checkpoint: str = "{checkpoint}",
    out: str = "{engine}",
    timing_cache: str = "{timing_cache}",
) -> list[str]:
    """`trtllm-build` for all ranks: reads `checkpoint`, writes the engines into `out`, keeps its timings."""
    argv = ["trtllm-build", "--checkpoint_dir", checkpoint, "--output_dir", out]
    for name, size in _sizes(settings).items():
        argv += [f"--{name}", str(size)]
    # A file that is not there yet is ignored by the one, and written by the other.
    argv += ["--input_timing_cache", timing_cache, "--output_timing_cache", timing_cache]
    if settings.gpus > 1 and "workers" not in settings.build:
        argv += ["--workers", str(settings.gpus)]  # trtllm-build lowers it to the GPUs that it sees
    return argv + _flags("build", settings.build)


def build_config(settings: Settings) -> dict[str, Json]:
    """The build by the names of TensorRT-LLM's BuildConfig: for the record, and for its Python API.

    Enumerations are by the names of their members; what is not there has BuildConfig's default.
    """
    given = settings.build
    config: dict[str, Json] = dict(_sizes(settings))
    config |= {name: given[name] for name in _BUILD_CONFIG_NAMES if name in given}
    if given.get("gather_all_token_logits"):
        config |= {"gather_context_logits": True, "gather_generation_logits": True}
    for name in ("kv_cache_type", "speculative_decoding_mode"):  # enumerations, by the names of their members
        if name in config:
            config[name] = str(config[name]).upper()
    elsewhere = (*_BUILD_CONFIG_NAMES, *_LORA_NAMES, *_COMMAND_ONLY)
    plugins: dict[str, Json] = {name: _plugin_value(settings, name) for name in given if name not in elsewhere}
    if given.get("fast_build"):  # commands/build.py
        plugins["manage_weights"] = True
    config["plugin_config"] = plugins
    if any(name in given for name in _LORA_NAMES):
        config["lora_config"] = {name: given[name] for name in _LORA_NAMES if name in given}
    return config


def serve_command(
    settings: Settings, model: str = "{model}", *, port: str = "{port}", prepared: str = "{prepared}"
) -> list[str]:
    """`trtllm-serve` for a bundle, or for the engines in `model`; the YAML and an engine's tokenizer in `prepared`."""
    version = versions.find(settings.version)
    argv = ["trtllm-serve", model, "--port", port]
    if settings.resolved_mode == "engine":
        argv += ["--tokenizer", prepared]
        if version.at_least("1.0.0"):
            argv += ["--backend", "trt"]  # the default until then; from 1.0 it is PyTorch
    if version.at_least("1.3.0rc21"):  # until then the name is the folder's
        argv += ["--served_model_name", settings.served_name]
    sizes = _sizes(settings)
    for name in ("max_batch_size", "max_num_tokens", "max_seq_len", "max_beam_width"):
        argv += [f"--{name}", str(sizes[name])]
    argv += ["--tp_size", str(settings.tensor_parallel), "--pp_size", str(settings.pipeline_parallel)]
    if settings.expert_parallel > 1:
        argv += ["--ep_size", str(settings.expert_parallel)]
    if settings.trust_remote_code:
        argv += ["--trust_remote_code"]
    argv += ["--extra_llm_api_options", f"{prepared}/serve.yaml"]
    return argv + _flags("serve", {k: v for k, v in settings.serve.items() if versions.option("serve", k)})


def serve_yaml(settings: Settings, *, paged_context: bool = True) -> str:
    """The YAML of `trtllm-serve`; it is read over the flags. paged_context: see `files`."""
    import yaml

    fields: dict[str, Json] = {}
    if settings.resolved_mode == "bundle":
        fields["max_input_len"] = settings.max_input_len
        if settings.dtype != "auto":
            fields["dtype"] = settings.dtype
    cache: dict[str, Json] = {"free_gpu_memory_fraction": FREE_GPU_MEMORY_FRACTION}
    if settings.resolved_mode == "bundle" and settings.kv_cache == "fp8":
        cache["dtype"] = "fp8"  # an engine has what its checkpoint says
    if settings.resolved_mode == "engine" and not paged_context:
        cache["enable_block_reuse"] = False  # it is on unless told otherwise
    given = {k: v for k, v in settings.serve.items() if versions.option("yaml", k)}
    own = given.pop("kv_cache_config", None)
    fields["kv_cache_config"] = cache | own if isinstance(own, dict) else cache
    heading = f"# For `trtllm-serve --extra_llm_api_options`, TensorRT-LLM {settings.version}.\n"
    return heading + yaml.safe_dump(fields | given, sort_keys=False)


def commands(settings: Settings) -> dict[str, Json]:
    """What commands.json holds."""
    build: list[Json] = [list(build_command(settings))] if settings.resolved_mode == "engine" else []
    return {"build": build, "serve": list(serve_command(settings))}


def files(settings: Settings, *, paged_context: bool = True) -> dict[str, str]:
    """Every file of this module, by its name in the artifact.

    The lengths are known: see `Settings.sized`. paged_context: `rules.has_paged_context` of the engines.
    """
    yaml = serve_yaml(settings, paged_context=paged_context)
    texts = {"commands.json": _json(commands(settings)), "serve.yaml": yaml}
    if settings.resolved_mode == "engine":
        texts["build_config.json"] = _json(build_config(settings))
    return texts | scripts(settings)


def scripts(settings: Settings) -> dict[str, str]:
    """`serve.sh` and `health.sh`, and `build.sh` where there is something to build."""
    texts = {"serve.sh": _serve_script(settings), "health.sh": (_SCRIPTS / "health.sh").read_text(encoding="utf-8")}
    return texts if settings.resolved_mode == "bundle" else {"build.sh": _build_script(settings), **texts}


def _sizes(settings: Settings) -> dict[str, int]:
    """As TensorRT-LLM makes them: a pass never holds more tokens than all sequences have (check_max_num_tokens)."""
    assert settings.max_input_len is not None  # `Settings.sized` has been there
    assert settings.max_seq_len is not None
    most = settings.max_seq_len * settings.max_batch_size
    return {
        "max_batch_size": settings.max_batch_size,
        "max_input_len": settings.max_input_len,
        "max_seq_len": settings.max_seq_len,
        "max_num_tokens": min(settings.max_num_tokens, most),
        "max_beam_width": settings.max_beam_width,
    }


def _flags(section: versions.Section, values: Mapping[str, Json]) -> list[str]:
    argv: list[str] = []
    for name, value in values.items():
        row = versions.option(section, name)
        assert row is not None, name  # the settings were checked
        if row.kind == "flag":
            argv += [f"--{name}"] if value else []
        elif row.kind == "onoff":
            argv += [f"--{name}", "enable" if value in (True, "enable") else "disable"]
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv += [f"--{name}", str(value)]
    return argv


def _plugin_value(settings: Settings, name: str) -> Json:
    row = versions.option("build", name)
    if row is not None and row.kind == "onoff":
        return rules.is_on(settings, name)
    value = settings.build[name]
    return None if value == "disable" else value


def _json(value: Json) -> str:
    return json.dumps(value, indent=2) + "\n"


def _array(argv: Sequence[str], variables: Mapping[str, str]) -> str:
    """The lines of a bash array: a flag and its values a line, a variable for each placeholder."""
    lines: list[str] = []
    for argument in argv:
        word = shlex.quote(argument)
        for placeholder, variable in variables.items():
            if placeholder in argument:
                word = f'"{argument.replace(placeholder, variable)}"'
        if argument.startswith("--") or not lines or not lines[-1].startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(f"  {line}" for line in lines)


def _build_script(settings: Settings) -> str:
    variables = {"{checkpoint}": "$here/checkpoint", "{engine}": "$partial", "{timing_cache}": "$beside/timing.cache"}
    return _fill("build.sh", settings, {"command": _array(build_command(settings), variables)})


def _serve_script(settings: Settings) -> str:
    engine = settings.resolved_mode == "engine"
    variables = {"{model}": "$model", "{port}": "$port", "{prepared}": "$here"}
    return _fill(
        "serve.sh",
        settings,
        {
            "command": _array(serve_command(settings), variables),
            "folder": "engine" if engine else "model",
            "missing": "\\`bash build.sh\\` makes it" if engine else "copy the whole artifact",
        },
    )


def _fill(name: str, settings: Settings, values: Mapping[str, str]) -> str:
    """The script `name` of the folder scripts/, with `@key@` replaced."""
    text = (_SCRIPTS / name).read_text(encoding="utf-8")
    all_values = {
        "common": (_SCRIPTS / "common.sh").read_text(encoding="utf-8"),
        "what": f"TensorRT-LLM {settings.version}{_for(settings)}",
        "version": settings.version,
        "architecture": settings.architecture or "",
        "gpus": str(settings.gpus),
        **values,
    }
    for key, value in all_values.items():
        text = text.replace(f"@{key}@", value)
    return text


def _for(settings: Settings) -> str:
    gpus = f" on {settings.gpus} GPUs" if settings.gpus > 1 else ""
    return gpus + (f" of {settings.architecture}" if settings.architecture else "")
