"""Write TensorRT-LLM's unified checkpoint from any checkpoint that we read: config.json and rankN.safetensors.

Nothing is quantized here: codes and scales are carried over, block by block, so that what a rank's tensors say is what
the source says. What cannot be carried over exactly is told in events.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from llmopt.artifacts.outcome import Progress
from llmopt.compilers.trt_llm.config import EMBEDDING, FINAL_NORM, HEAD, EngineConfig
from llmopt.compilers.trt_llm.encode import Piece, encode, qkv_piece, split_piece, to_largest_scale
from llmopt.compilers.trt_llm.families import AWQ, FP8, SMOOTH_DYNAMIC
from llmopt.compilers.trt_llm.layout import KV_SCALES, Module, layout, modules
from llmopt.compilers.trt_llm.rank_file import RankFile
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.compilers.trt_llm.sources import DENSE, FC, GATE, PROJ, QKV, block_linears
from llmopt.errors import LlmoptError
from llmopt.formats.base import QuantizedWeight, Stored, as_float, store_float
from llmopt.formats.reading import Source
from llmopt.models.checkpoint import bfloat16_to_float32
from llmopt.models.companions import write_json
from llmopt.models.families import K_NORM, Q_NORM

_REQUANTIZE = "quantize the original into the format that you need"
_CHUNK_BYTES = 1 << 24  # of the embedding at once
#: Suffixes of a linear without which its groups are consecutive and centred, and its input is taken as it is.
_ODD = ("g_idx", "weight_g_idx", "qzeros", "weight_zero_point", "pre_quant_scale")


def check(source: Source, settings: Settings) -> EngineConfig:
    """All that can be told before the codes are read; SettingsError or LlmoptError with what to do instead."""
    config = EngineConfig.of(source, settings)
    if config.algorithm is not None:
        for index in range(config.layers):
            for module, linears in block_linears(source.config).items():
                if f"transformer.layers.{index}.{module}" not in config.plain:
                    check_grids(source, config, index, module, linears)
        source.checkpoint.release()
    _kv_scales(source, config)
    return config


def write(source: Source, config: EngineConfig, out: Path, progress: Progress) -> tuple[str, ...]:
    """Write the checkpoint of `check`'s config into the folder `out`; returns events: what changed numbers.

    Peak memory is one module of a block, or a run of the embedding's rows. The same input gives the same bytes.
    """
    out.mkdir(exist_ok=True)
    notes = _Notes()
    with ExitStack() as stack:
        files = [
            stack.enter_context(RankFile(out / f"rank{rank}.safetensors", layout(config, rank)))
            for rank in range(config.ranks)
        ]
        job = _Writer(source, config, files, notes, _kv_scales(source, config))
        job.embedding()
        progress("wrote the embedding")
        for index in range(config.layers):
            job.block(index)
            source.checkpoint.release()
            progress(f"wrote block {index + 1} of {config.layers}")
        job.head()
        source.checkpoint.release()
    write_json(out / "config.json", config.to_json())
    return notes.events(source, config)


@dataclass
class _Notes:
    """What happened to numbers on the way."""

    codes_changed: int = 0
    scales_merged: list[str] = field(default_factory=list)
    inputs_merged: list[str] = field(default_factory=list)
    rounded: int = 0
    smooth_rounded: int = 0
    loader_rounds: int = 0
    head_dequantized: bool = False

    def events(self, source: Source, config: EngineConfig) -> tuple[str, ...]:
        told = []
        if self.scales_merged:
            told.append(
                f"{len(self.scales_merged)} groups of linears that TensorRT-LLM fuses ({self.scales_merged[0]}, ...) "
                f"had different FP8 scales: {self.codes_changed} weights were rounded again, to the largest"
            )
        if self.inputs_merged:
            told.append(
                f"{len(self.inputs_merged)} groups of linears that TensorRT-LLM fuses ({self.inputs_merged[0]}, ...) "
                "had different static scales of one input: the largest is used"
            )
        if self.rounded:
            told.append(f"{self.rounded} values that are not quantized were rounded to {config.dtype}")
        if self.smooth_rounded:
            told.append(f"{self.smooth_rounded} scales of inputs (`pre_quant_scale`) were rounded to {config.dtype}")
        if self.loader_rounds:
            told.append(
                f"TensorRT-LLM will round {self.loader_rounds} scales of weights to {config.dtype} as it loads them; "
                "`compile.dtype: float16` keeps more of them"
            )
        if self.head_dequantized:
            told.append(f"the quantized output head was turned into {config.dtype}: the engine has it unquantized")
        scales = "none" if source.reader is None else source.reader.encoding.kv_cache
        if config.kv_cache == "fp8" and scales == "none":
            told.append("the KV cache in FP8 has the scale 1 everywhere: the checkpoint has no scales for it")
        if config.kv_cache == "none" and scales != "none":
            told.append(f"the checkpoint's scales for a KV cache in {scales} are left out, as asked")
        window = source.config.sliding_window
        if window is not None and window < config.max_positions:
            told.append(
                f"the engine attends to everything, the model to {window} tokens: for longer sequences give the server "
                f"`max_attention_window` in `kv_cache_config`"
            )
        return tuple(told)


@dataclass(frozen=True)
class _Writer:
    source: Source
    config: EngineConfig
    files: list[RankFile]
    notes: _Notes
    kv_scales: list[tuple[float, float]]

    def embedding(self) -> None:
        first = self.files[: self.config.tensor_parallel]
        self._table(first, f"{EMBEDDING}.weight", f"{self.source.config.family.embedding}.weight")

    def head(self) -> None:
        """The last norm and the output head; a tied one is the embedding once more."""
        model, last = self.source.config, self.files[-self.config.tensor_parallel :]
        self._norm(last, FINAL_NORM, model.family.final_norm)
        name = f"{model.family.embedding if model.tie_embeddings else model.family.head}.weight"
        reader = self.source.reader
        if model.tie_embeddings or reader is None or reader.scheme(model.family.head) is None:
            self._table(last, f"{HEAD}.weight", name)
            return
        weight = reader.linear(model.family.head, (self.config.vocab_size, self.config.hidden_size))
        assert weight is not None
        self.notes.head_dequantized = True
        self._table(last, f"{HEAD}.weight", weight)

    def block(self, index: int) -> None:
        config, model = self.config, self.source.config
        tp, stage = config.tensor_parallel, index // (config.layers // config.pipeline_parallel)
        files, block = self.files[stage * tp : (stage + 1) * tp], model.block(index)
        local = f"transformer.layers.{index - config.layers_of_rank(stage * tp).start}"
        for norm, name in zip(config.norms, (model.family.attn_norm, model.family.mlp_norm), strict=False):
            self._norm(files, f"{local}.{norm}", f"{block}.{name}")
            if config.algorithm == SMOOTH_DYNAMIC:
                _put(files, f"{local}.{norm}.scale_to_int", _scalar(1.0))
        if config.family.qk_norm:
            for norm, name in (("q", Q_NORM), ("k", K_NORM)):
                _put(files, f"{local}.attention.{norm}_layernorm.weight", self._floats(f"{block}.{name}.weight"))
        if config.kv_cache != "none":
            k_scale, v_scale = self.kv_scales[index]
            for name, scale in zip(KV_SCALES, (k_scale, v_scale, max(k_scale, v_scale)), strict=True):
                _put(files, f"{local}.{name}", _scalar(scale))
        for fusion in self._fusions():
            parts = [
                _ModulePart(module, f"{local}.{module.name}", [f"{block}.{name}" for name in linears])
                for module, linears in fusion
            ]
            for part in parts:
                if part.module.bias:
                    self._floats_of(files, part, "bias")
            if config.algorithm is None or f"transformer.layers.{index}.{fusion[0][0].name}" in config.plain:
                for part in parts:
                    self._floats_of(files, part, "weight")
            else:
                self._codes_of(files, parts, index)

    def _fusions(self) -> list[list[tuple[Module, tuple[str, ...]]]]:
        """The modules of a block with their linears; together those whose FP8 scales become one, as ModelOpt has it:
        the builder makes one product of `fc` and `gate`, and rounds to half precision on the way where they differ."""
        linears = block_linears(self.source.config)
        found = {module.name: [(module, linears[module.name])] for module in modules(self.config)}
        if self.config.algorithm == FP8 and GATE in found:
            found[FC] += found.pop(GATE)
        return list(found.values())

    def _floats_of(self, files: list[RankFile], part: _ModulePart, suffix: str) -> None:
        """The weight or the bias of a module that is not quantized, on each rank."""
        for number, file in enumerate(files):
            piece, cast = self._piece(part, number), []
            for prefix, rows in zip(part.prefixes, piece.rows, strict=True):
                name = f"{prefix}.{suffix}"
                own = Piece(rows=(rows,), columns=piece.columns).of([self.source.checkpoint.array(name)])
                cast.append(self._cast(name, own, self.source.checkpoint.tensors[name].dtype).array)
            file.put(f"{part.name}.{suffix}", Stored(self.config.stored_dtype, np.concatenate(cast)))

    def _codes_of(self, files: list[RankFile], parts: list[_ModulePart], index: int) -> None:
        """Modules that are quantized, on each rank."""
        reader = self.source.reader
        assert reader is not None
        prefixes = [prefix for part in parts for prefix in part.prefixes]
        weights = {prefix: self._weight(prefix, index) for prefix in prefixes}
        inputs = [scale for prefix in prefixes if (scale := reader.input_scale(prefix)) is not None]
        if len(set(inputs)) > 1:
            self.notes.inputs_merged.append(prefixes[0])
        if self.config.algorithm == FP8 and len(prefixes) > 1:
            same, changed = to_largest_scale(list(weights.values()))
            if len({float(weight.scale_OG[0, 0]) for weight in weights.values()}) > 1:
                self.notes.scales_merged.append(prefixes[0])
            self.notes.codes_changed += changed
            weights = dict(zip(prefixes, same, strict=True))
        for part in parts:
            own = [weights[prefix] for prefix in part.prefixes]
            for number, file in enumerate(files):
                tensors = encode(self.config, part.module, own, self._piece(part, number), max(inputs, default=None))
                for suffix, stored in tensors.items():
                    file.put(f"{part.name}.{suffix}", stored)

    def _weight(self, prefix: str, index: int) -> QuantizedWeight:
        """The codes of a linear; counts what becomes of its scales."""
        reader, config = self.source.reader, self.config
        assert reader is not None
        name = prefix.removeprefix(f"{self.source.config.block(index)}.")
        weight = reader.linear(prefix, self.source.config.linear_shapes(index)[name])
        assert weight is not None
        input_scale = reader.input_scale(prefix)
        scales = np.append(weight.scale_OG, [] if input_scale is None else [input_scale])
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise LlmoptError(f"`{prefix}` has scales that are not positive numbers", hint=_REQUANTIZE)
        if weight.kind == "float" and ((weight.codes_OI & 0x7F) == 0x7F).any():
            raise LlmoptError(f"`{prefix}` has FP8 weights that are no numbers", hint=_REQUANTIZE)
        if config.algorithm == AWQ:
            self.notes.loader_rounds += _changed(weight.scale_OG, config.stored_dtype)
        if weight.smooth_I is not None and config.algorithm != SMOOTH_DYNAMIC:
            self.notes.smooth_rounded += _changed(weight.smooth_I, config.stored_dtype)
        return weight

    def _piece(self, part: _ModulePart, number: int) -> Piece:
        config, module = self.config, part.module
        if module.name == QKV:
            return qkv_piece(config, self.source.config.family, number)
        tp = config.tensor_parallel
        shape = (module.rows * tp, module.columns) if module.split == "rows" else (module.rows, module.columns * tp)
        return split_piece(shape, module.split, number, tp)

    def _norm(self, files: list[RankFile], name: str, source: str) -> None:
        for suffix in ("weight",) if self.config.family.rms else ("weight", "bias"):
            _put(files, f"{name}.{suffix}", self._floats(f"{source}.{suffix}"))

    def _table(self, files: list[RankFile], name: str, source: str | QuantizedWeight) -> None:
        """Rows of the vocabulary, in turn on each rank, filled up with zeros; a run of them in memory at a time."""
        config = self.config
        each = config.vocab_size_padded // len(files)
        step = max(1, _CHUNK_BYTES // (4 * config.hidden_size))
        for number, file in enumerate(files):
            for row in range(0, each, step):
                start, stop = number * each + row, number * each + min(row + step, each)
                stored = self._rows(source, start, min(stop, config.vocab_size))
                if missing := stop - start - len(stored.array):
                    padded = np.concatenate([stored.array, np.zeros((missing, config.hidden_size), stored.array.dtype)])
                    stored = Stored(stored.dtype, padded)
                file.put(name, stored, row)
                self.source.checkpoint.release()

    def _rows(self, source: str | QuantizedWeight, start: int, stop: int) -> Stored:
        """Rows of a table that is stored in floats, or of one that has to be dequantized."""
        if isinstance(source, str):
            array, dtype = self.source.checkpoint.array(source), self.source.checkpoint.tensors[source].dtype
            return self._cast(source, array[start:stop], dtype)
        rows = slice(start, stop)
        zero_OG = None if source.zero_OG is None else source.zero_OG[rows]
        part = replace(source, codes_OI=source.codes_OI[rows], scale_OG=source.scale_OG[rows], zero_OG=zero_OG)
        return store_float(part.dequantize(), self.config.stored_dtype)

    def _floats(self, name: str) -> Stored:
        return self._cast(name, self.source.checkpoint.array(name), self.source.checkpoint.tensors[name].dtype)

    def _cast(self, name: str, array: np.ndarray, dtype: str) -> Stored:
        """A tensor of the checkpoint in the engine's dtype; counts what that rounds."""
        wanted = self.config.stored_dtype
        if not _finite(array, dtype):
            raise LlmoptError(f"`{name}` has values that are no numbers", hint="download the checkpoint again")
        if dtype == wanted:
            return Stored(dtype, array)
        floats = bfloat16_to_float32(array) if dtype == "BF16" else np.asarray(array, np.float32)
        with np.errstate(over="ignore"):
            stored = store_float(floats, wanted)
        read = as_float(stored)
        if not np.isfinite(read).all():
            raise LlmoptError(
                f"`{name}` has values that {self.config.dtype} does not hold", hint="set `compile.dtype: bfloat16`"
            )
        self.notes.rounded += int((read != floats).sum())
        return stored


@dataclass(frozen=True, slots=True)
class _ModulePart:
    """A module of a block: its name on the ranks, and the full prefixes of its linears in the checkpoint."""

    module: Module
    name: str
    prefixes: list[str]


def _put(files: list[RankFile], name: str, stored: Stored) -> None:
    for file in files:
        file.put(name, stored)


def _scalar(value: float) -> Stored:
    return Stored("F32", np.array([value], np.float32))


def _finite(array: np.ndarray, dtype: str) -> bool:
    """Whether all are numbers; BF16 comes as its bits."""
    return bool(((array & 0x7F80) != 0x7F80).all() if dtype == "BF16" else np.isfinite(array).all())


def _changed(values: np.ndarray, dtype: str) -> int:
    with np.errstate(over="ignore"):
        return int((as_float(store_float(values, dtype)) != values).sum())


def check_grids(source: Source, config: EngineConfig, index: int, module: str, linears: tuple[str, ...]) -> None:
    """That the codes of a module can be carried over: no zero points, groups in order, one scale of the input."""
    reader, block = source.reader, source.config.block(index)
    assert reader is not None
    smooths: list[np.ndarray | None] = []
    for linear in linears:
        prefix = f"{block}.{linear}"
        if not any(f"{prefix}.{suffix}" in source.checkpoint.tensors for suffix in _ODD):
            smooths.append(None)
            continue
        grid = reader.grid(prefix, source.config.linear_shapes(index)[linear])
        if grid.zero_OG is not None:
            raise LlmoptError(
                f"`{prefix}` has zero points, which TensorRT-LLM's `{config.algorithm}` does not",
                hint="quantize the original with `--symmetric`",
            )
        if grid.order_I is not None:
            raise LlmoptError(
                f"`{prefix}` has groups of scattered columns (`desc_act`), which TensorRT-LLM does not have",
                hint="quantize the original without them; `llmopt quantize --act-order` keeps groups consecutive",
            )
        smooths.append(grid.smooth_I)
    smooth = smooths[0]
    for linear, other in zip(linears, smooths, strict=True):
        if not (smooth is other or (smooth is not None and other is not None and np.array_equal(smooth, other))):
            raise LlmoptError(
                f"`{block}.{linear}` and `{block}.{linears[0]}` scale their one input differently", hint=_REQUANTIZE
            )
    from_norm = module not in (DENSE, PROJ)
    if smooth is not None and (config.algorithm == FP8 or (config.algorithm == SMOOTH_DYNAMIC and from_norm)):
        raise LlmoptError(
            f"`{block}.{linears[0]}` has a `pre_quant_scale`, which `{config.algorithm}` does not", hint=_REQUANTIZE
        )


def _kv_scales(source: Source, config: EngineConfig) -> list[tuple[float, float]]:
    """The scales of k and v of each block; LlmoptError where a block has none, or none that is a positive number."""
    if config.kv_cache == "none":
        return []
    assert source.reader is not None or config.kv_cache == "fp8"
    found = {} if source.reader is None else source.reader.kv_scales()
    if not found and config.kv_cache == "fp8":
        return [(1.0, 1.0)] * config.layers  # what ModelOpt recommends, and makes of any scale below
    by_block = {module.rpartition(".")[0]: scales for module, scales in found.items()}
    scales = []
    for index in range(config.layers):
        block = source.config.block(index)
        own = by_block.get(block)
        if own is None or not all(np.isfinite(scale) and scale > 0 for scale in own):
            raise LlmoptError(f"`{block}` has no scales of its KV cache that are positive numbers", hint=_REQUANTIZE)
        scales.append(own)
    return scales
