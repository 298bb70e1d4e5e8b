"""The target `openvino`: a stateful OpenVINO IR with its tokenizer, for openvino-genai on a CPU.

The IR is the artifact: it is the same bytes for the same inputs, and no machine's own. What the plugin compiles from it
is neither, so that stays a cache of the machine that serves.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmopt.artifacts.outcome import Json, Outcome, Progress
from llmopt.errors import LlmoptError, SettingsError
from llmopt.models.companions import copy_companions

if TYPE_CHECKING:
    from llmopt.formats.reading import Source

_ACTIVATION_GROUP = 128
_MODEL = "openvino_model.xml"
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # those whose blocks the graph builder has


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenVINO:
    """Exact arithmetic is `lm_head: keep`, `activation_group: 0`, `precision: f32`.

    aot: compile here as well, and run one token, so that an engine that this machine cannot run is not delivered.
    lm_head: int8 rows, or as the checkpoint has it; auto: int8 if the checkpoint is quantized.
    activation_group: in-features that share a scale when activations are rounded to int8 on the fly, 0 for no rounding;
    None: 128 if the checkpoint is quantized, else 0. Static scales of the checkpoint are used whatever this says.
    precision: of the arithmetic; auto: f32 if the checkpoint is quantized, else the plugin's choice for its machine.
    kv_cache: auto: f32 where the arithmetic is exact otherwise, else the plugin's choice (int8).
    """

    portable: ClassVar[bool] = False

    target: Literal["openvino"] = "openvino"
    aot: bool = True
    lm_head: Literal["auto", "int8", "keep"] = "auto"
    activation_group: int | None = None
    precision: Literal["auto", "f32", "bf16"] = "auto"
    kv_cache: Literal["auto", "f32", "u8"] = "auto"

    def __post_init__(self) -> None:
        group = self.activation_group
        if group is not None and (group < 0 or group % 32):
            raise SettingsError(
                f"`compile.activation_group` cannot be `{group}`", hint="a multiple of 32 such as `128`, or 0 for none"
            )

    def deps(self) -> tuple[str, ...]:
        return ("openvino", "openvino-tokenizers", "tokenizers", "transformers")

    def check(self, model: Path) -> None:
        _read(model)

    def compile(self, model: Path, out: Path, progress: Progress) -> Outcome:
        source = _read(model)
        from llmopt.compilers.ov.save import save_tokenizer

        round_head, properties = self._round_head(source), self._properties(source)
        progress(f"building the graph of {source.config.layers} blocks")
        weight_bytes = _write_model(source, out, round_head=round_head)
        progress("converting the tokenizer")
        save_tokenizer(model, out)
        _copy_companions(model, out, source.checkpoint.config)
        description = _describe(source, properties)
        (out / "engine.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if self.aot:
            progress("compiling for this machine")
            _try_out(out / _MODEL, properties)
        return Outcome(
            status="compiled",
            metrics={
                "properties": properties,
                "lm_head": "int8" if round_head else "keep",
                "weight_bytes": weight_bytes,
                "max_context_tokens": description["max_context_tokens"],
            },
        )

    def _round_head(self, source: Source) -> bool:
        return self.lm_head == "int8" or (self.lm_head == "auto" and source.reader is not None)

    def _properties(self, source: Source) -> dict[str, Json]:
        """What the runtime is told when it loads the engine."""
        quantized = source.reader is not None
        group = self.activation_group
        if group is None:
            group = _ACTIVATION_GROUP if quantized else 0
        precision = "f32" if self.precision == "auto" and quantized else self.precision
        exact = precision == "f32" and group == 0
        kv_cache = "f32" if self.kv_cache == "auto" and exact else self.kv_cache
        hints = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": kv_cache}
        return {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group} | {k: v for k, v in hints.items() if v != "auto"}


def _read(model: Path) -> Source:
    """The checkpoint, checked from its headers, and that it has a tokenizer to convert; raises LlmoptError."""
    from llmopt.formats.reading import open_model

    source = open_model(model)
    model_type = source.config.family.model_type
    if model_type not in _FAMILIES:
        raise LlmoptError(
            f"the target `openvino` cannot compile the model type `{model_type}`",
            hint="it compiles " + ", ".join(f"`{name}`" for name in _FAMILIES),
        )
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise LlmoptError(
            f"no tokenizer in `{model}`", hint="copy tokenizer.json and tokenizer_config.json beside the weights"
        )
    return source


def _write_model(source: Source, out: Path, *, round_head: bool) -> dict[str, Json]:
    """Write the IR; returns the bytes of its constants by OpenVINO element type."""
    from llmopt.compilers.ov.constants import Constants, Scratch
    from llmopt.compilers.ov.ir import build_decoder
    from llmopt.compilers.ov.save import save

    with Scratch.open(out) as scratch:
        constants = Constants(source.checkpoint, source.reader, scratch)
        save(build_decoder(source.config, source.checkpoint, constants, round_head=round_head), out / _MODEL)
    return dict(sorted(constants.bytes_by_type.items()))


def _describe(source: Source, properties: dict[str, Json]) -> dict[str, Any]:
    config, checkpoint = source.config, source.checkpoint
    window = config.sliding_window
    return {
        "schema": "llmopt.engine/1",
        "target": "openvino",
        "arch": platform.machine(),
        "model_type": config.family.model_type,
        "vocab_size": config.vocab_size,
        # The graph attends to everything, which is what the model does up to its window.
        "max_context_tokens": config.max_positions if window is None else min(config.max_positions, window),
        "eos_token_ids": list(_eos_token_ids(checkpoint.path) or config.eos_token_ids),
        "properties": properties,
    }


def _eos_token_ids(model: Path) -> tuple[int, ...]:
    """Those of generation_config.json, which may be more than config.json has; none where it says nothing."""
    file = model / "generation_config.json"
    if not file.is_file():
        return ()
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except ValueError as error:
        raise LlmoptError(f"`{file}` is not JSON: {error}", hint="download it again, or delete it") from None
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _copy_companions(model: Path, out: Path, config: Any) -> None:
    """The tokenizer's files and the config, which no longer says how the weights were encoded on disk."""
    copy_companions(model, out)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _try_out(file: Path, properties: dict[str, Json]) -> None:
    """Compile for this machine's CPU and run one token; raises LlmoptError when it cannot or gives no number."""
    import numpy as np

    from llmopt.backends import load

    try:
        compiled = load("openvino").Core().compile_model(file, "CPU", properties)
        zero, one = np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64)
        beam = np.zeros(1, np.int32)
        logits = compiled({"input_ids": zero, "attention_mask": one, "position_ids": zero, "beam_idx": beam})["logits"]
    except RuntimeError as error:
        raise LlmoptError(
            f"OpenVINO cannot compile the engine on this machine: {error}",
            hint="`--jit` leaves that to the machine that serves",
        ) from error
    if not np.isfinite(logits).all():
        raise LlmoptError(
            "the engine's logits are not numbers", hint="are there NaN or infinite weights in the checkpoint?"
        )
