"""Stream a checkpoint through a method: read a block, calibrate, quantize, pass its outputs on, write it, free it.

Each block runs once for GPTQ and rounding to nearest (a site's weights are replaced before their outputs are
computed), twice where scales are searched, which need the inputs of all sites first. Batches run on all cores with one
BLAS thread each; sums over them are taken in their order: the bytes do not depend on the number of cores. A finished
block is durable: the same run, started again, goes on after it.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from llmopt import memory
from llmopt.artifacts.outcome import Json, Outcome, Progress
from llmopt.formats.dequantized import fp8_input, int8_input, load_block, load_float, to_torch
from llmopt.formats.reading import all_modules, get_format, linears, open_quantized
from llmopt.formats.scheme import Scheme
from llmopt.models.checkpoint import Checkpoint, TensorInfo, read_header
from llmopt.models.companions import copy_companions, write_json
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import DecoderBlock, InputTransform, embed, final_norm, position_tables
from llmopt.models.families import Site
from llmopt.models.parallel import Workers
from llmopt.models.writer import CheckpointWriter, Writable
from llmopt.quantizers import errors_report
from llmopt.quantizers.activations import kv_scales
from llmopt.quantizers.base import Rounded, Statistics, sample_every
from llmopt.quantizers.budget import bit_candidates
from llmopt.quantizers.execution import Execution
from llmopt.quantizers.journal import Journal
from llmopt.quantizers.memory import BATCH_TOKENS, ROWS, shelf_bytes
from llmopt.quantizers.methods import Context, Scaler, method_of
from llmopt.quantizers.rtn import rtn
from llmopt.quantizers.scaling import fold_scale, tie_heads
from llmopt.quantizers.sensitivity import choose_bits
from llmopt.quantizers.settings import QuantizeSettings
from llmopt.quantizers.shelf import Batch, Shelf

_JUDGED_ROWS = 512  # of a linear, evenly spaced, or all of fewer: enough to tell its error
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
Tensors: TypeAlias = dict[str, Writable]


@dataclass
class _Part:
    """What quantizing a block, or the head, came to beside its tensors."""

    tensors: Tensors = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)  # relative, by linear
    stored_bits: int = 0  # of the quantized linears: codes, scales, zero points, shapes
    kv_peak: torch.Tensor | None = None  # the largest |key| and |value|, where they are watched

    def note_peak(self, batch: Batch) -> None:
        if (peak := batch.ours.kept.get("kv_peak")) is not None:
            self.kv_peak = peak if self.kv_peak is None else torch.maximum(self.kv_peak, peak)


class Driver:
    """One run over one checkpoint. `windows` [N, T] is None for methods without calibration."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        settings: QuantizeSettings,
        windows: np.ndarray | None,
        workers: Workers,
        progress: Progress,
        execution: Execution,
    ) -> None:
        self._checkpoint, self._config, self._settings, self._progress = checkpoint, config, settings, progress
        self._windows, self._workers, self._map, self._execution = windows, workers, workers.map, execution
        self._half = execution.bfloat16
        self._schemes = self._resolve_schemes()
        self._format = get_format(settings.common.format)
        self._scaler, self._rounder = method_of(settings.method)
        # What the scaler sees is all there is to see: then the original's activations are passed on.
        self._once = self._scaler is not None and not self._rounder.wanted
        self._sample_every = 1 if windows is None else sample_every(windows.size)
        if windows is not None:
            self._tables = position_tables(config, windows.shape[1])

    @torch.no_grad()
    def run(self, out: Path) -> Outcome:
        """Quantize every block in turn and write the checkpoint.

        `out` is empty, or holds what a run with the very same arguments left when it was ended early.
        """
        config = self._config
        writer, journal = (
            CheckpointWriter(out, config.layers + 2),
            Journal(out / ".begun", self._execution.save_after_s),
        )
        records = journal.finished([writer.shard(number + 1) for number in range(config.layers + 2)])
        if not records:
            records.append({"events": [], "errors": {}, "stored_bits": 0})
            tables = {name: self._checkpoint.source(name) for name in config.embedding_shapes()}
            journal.record(0, writer.write(1, tables), records[0])
        choice = None if self._settings.common.target_bpw is None else self._choose_bits(journal)
        shelf = self._resume(out, journal, min(len(records) - 1, config.layers))
        for number in range(len(records), config.layers + 2):
            last = number > config.layers
            started = time.monotonic()
            part = self._finish(shelf) if last else self._quantize_block(number - 1, shelf)
            records.append({"events": part.events, "errors": part.errors, "stored_bits": part.stored_bits})
            journal.record(number, writer.write(number + 1, part.tensors), records[-1])
            self._checkpoint.release()
            if not last:
                journal.save(number, shelf)
                self._tell(number, part, time.monotonic() - started)
        return self._outcome(writer, out, journal, records, choice)

    @torch.no_grad()
    def check_block(self, quantized: Path, index: int, scratch: Path) -> list[str]:
        """Quantize block `index` again, after the blocks before it as `quantized` has them; the tensors that differ."""
        shelf, written = self._embed(scratch), Checkpoint.open(quantized)
        if self._settings.common.target_bpw is not None and (reader := open_quantized(written)) is not None:
            self._schemes |= {name: reader.scheme(name) for name in linears(self._config)}
        self._replay(shelf, written, range(index))
        part = self._quantize_block(index, shelf)
        return [name for name, value in part.tensors.items() if not _same(value, written, name)]

    def _resolve_schemes(self) -> dict[str, Scheme | None]:
        """How each linear will be quantized, by its full prefix; None where it stays as it is."""
        found: dict[str, Scheme | None] = {}
        for prefix in linears(self._config):
            quantized = self._settings.common.lm_head or prefix != self._config.family.head
            found[prefix] = self._settings.scheme_of(prefix) if quantized else None
        return all_modules(self._config, found)

    def _choose_bits(self, journal: Journal) -> Mapping[str, Json]:
        """Give each linear its bits; what was chosen is kept, so a run that goes on asks no more."""
        assert self._windows is not None
        if (noted := journal.noted("choice")) is None:
            spill = journal.folder / "sensitivity"
            shutil.rmtree(spill, ignore_errors=True)
            spill.mkdir(parents=True)
            source = (self._checkpoint, self._config)
            noted = choose_bits(*source, self._settings, self._windows, self._workers, self._progress, spill=spill)
            journal.note("choice", noted)
        candidates = bit_candidates(self._config, self._settings).schemes
        self._schemes |= {name: candidates[name][index] for name, index in noted["picked"].items()}
        found: Mapping[str, Json] = noted["choice"]
        return found

    def _weights(self, names: Iterable[str]) -> int:
        shapes = linears(self._config)
        return sum(shapes[name][0] * shapes[name][1] for name in names)

    # -- activations

    def _embed(self, folder: Path) -> Shelf:
        """The calibration windows as batches; none without calibration."""
        windows = self._windows
        capacity = 0 if windows is None else self._shelf_bytes(windows.shape[1])
        shelf = Shelf(folder, capacity, self._half)
        if windows is None:
            return shelf
        parts = torch.split(torch.from_numpy(windows), max(1, BATCH_TOKENS // windows.shape[1]))
        for number, ids_BT in enumerate(parts):
            x = embed(self._checkpoint, self._config, ids_BT)
            shelf.put(number, Batch.start(x, x if self._rounder.compares else None, half=self._half))
        self._checkpoint.release()
        return shelf

    def _shelf_bytes(self, seq_len: int) -> int:
        return shelf_bytes(self._config, self._settings, seq_len, self._execution.memory_bytes)

    def _resume(self, out: Path, journal: Journal, done: int) -> Shelf:
        """The activations that enter block `done`: kept ones, carried on through the blocks finished since."""
        folder, layers = out / ".begun" / "shelf", self._config.layers
        if done:
            self._progress(f"going on after block {done}/{layers}", stage="quantize", done=done, total=layers)
        if done == 0 or self._windows is None:
            return self._embed(folder)
        if done == layers and self._schemes[self._config.family.head] is None:
            return Shelf(folder, 0, self._half)
        first, shelf = 0, None
        if (kept := journal.saved(done, half=self._half)) is not None:
            first, shelf = kept[0], Shelf(folder, self._shelf_bytes(self._windows.shape[1]), self._half)
            for number, batch in enumerate(kept[1]):
                shelf.put(number, batch)
        shelf = shelf or self._embed(folder)
        tensors: dict[str, TensorInfo] = {}
        for file in sorted(out.glob("model-*.safetensors")):
            tensors |= read_header(file)
        kv_cache = self._settings.common.kv_cache
        quantization = self._format.config(self._schemes, kv_cache=kv_cache)
        for beside in self._format.extra_files(self._schemes, kv_cache).values():
            quantization |= beside
        config = {**self._checkpoint.config, "quantization_config": quantization}
        self._replay(shelf, Checkpoint(out, config, tensors), range(first, done))
        return shelf

    def _replay(self, shelf: Shelf, written: Checkpoint, blocks: range) -> None:
        """Carry the activations through blocks that are quantized already."""
        reader = open_quantized(written)
        for index in blocks:
            block = load_block(written, self._config, reader, index)
            plain = self._rounder.compares or self._once
            original = load_block(self._checkpoint, self._config, None, index) if plain else block
            block = original if self._once else block
            block.half = original.half = self._half
            for site in self._config.sites(index):
                self._enter(block, original, site, shelf)
            self._leave(block, original, shelf)
            written.release()
            self._checkpoint.release()

    def _walk(self, shelf: Shelf, step: Callable[[Batch], Batch], seen: Callable[[Batch], None] | None = None) -> None:
        """Put `step` of every batch in its place, on all cores and in order; `seen` sees each on its way."""
        numbers = shelf.numbers()
        for number, batch in zip(numbers, self._map(lambda n: step(shelf.get(n)), numbers), strict=True):
            if seen is not None:
                seen(batch)
            shelf.put(number, batch)

    # -- one block

    def _quantize_block(self, index: int, shelf: Shelf) -> _Part:
        """The block's tensors for the disk; the shelf then holds its outputs."""
        config, prefix, part = self._config, self._config.block(index), _Part()
        sites = config.sites(index)
        block = load_block(self._checkpoint, config, None, index)
        self._checkpoint.release()
        if index + 1 < config.layers:
            self._checkpoint.prefetch(f"{config.block(index + 1)}.{name}" for name in config.block_shapes(index + 1))
        block.half, block.watch_kv = self._half, self._settings.common.kv_cache != "none"
        known: dict[str, Statistics] = {}
        folded: set[str] = set()
        if self._scaler is not None:
            known = self._observe(block, shelf, self._scaler, part)
            for site in sites:
                folded |= self._scale_site(block, site, known[site.name], self._scaler)
            for name in folded & block.tensors.keys() - self._quantized(index):
                stored = _DTYPES[self._checkpoint.tensors[f"{prefix}.{name}"].dtype]
                block.tensors[name] = block.tensors[name].to(stored).float()  # go on as what is written will
        original = (
            DecoderBlock(config, index, dict(block.tensors), half=self._half) if self._rounder.compares else block
        )
        for site in sites:
            statistics = Statistics() if self._rounder.wanted else known.get(site.name, Statistics())
            if not self._once:
                self._enter(block, original, site, shelf, statistics if self._rounder.wanted else None, part)
            self._round_site(block, site, statistics, part)
        if not self._once and (index + 1 < config.layers or self._schemes[config.family.head] is not None):
            self._leave(block, original, shelf)
        for name in config.block_shapes(index).keys() - self._quantized(index):
            part.tensors[f"{prefix}.{name}"] = self._plain(f"{prefix}.{name}", block.tensors[name], name in folded)
        if part.kv_peak is not None:
            scales = self._format.encode_kv(*kv_scales(part.kv_peak, self._settings.common.kv_cache))
            attention = config.family.o.rpartition(".")[0]
            part.tensors |= {f"{prefix}.{attention}.{suffix}": to_torch(value) for suffix, value in scales.items()}
        return part

    def _quantized(self, index: int) -> set[str]:
        """The weights of a block's linears that are quantized, by their names within the block."""
        prefix = self._config.block(index)
        return {f"{name}.weight" for name in self._config.linear_shapes(index) if self._schemes[f"{prefix}.{name}"]}

    def _plain(self, name: str, value: torch.Tensor, changed: bool) -> Writable:
        """A tensor that is not quantized: as it was, or in its own dtype."""
        return value.to(_DTYPES[self._checkpoint.tensors[name].dtype]) if changed else self._checkpoint.source(name)

    def _observe(self, block: DecoderBlock, shelf: Shelf, scaler: Scaler, part: _Part) -> dict[str, Statistics]:
        """Statistics of every site's input under the original weights; with `_once`, the outputs are shelved too."""
        sites = self._config.sites(block.index)
        found = {site.name: Statistics() for site in sites}

        def walk(number: int) -> tuple[list[torch.Tensor], Batch]:
            batch, seen = replace(shelf.get(number), original=None), []
            for site in sites:
                batch = batch.enter(block, block, site, self._tables)
                seen.append(batch.ours.site_input)
            return seen, batch

        for number, (seen, batch) in zip(shelf.numbers(), self._map(walk, shelf.numbers()), strict=True):
            for statistics, site_input in zip(found.values(), seen, strict=True):
                statistics.take(site_input, scaler.wanted, sample_every=self._sample_every, each=self._map)
            if self._once:
                part.note_peak(batch)
                shelf.put(number, batch.leave(block, block))
        return {name: statistics.finish() for name, statistics in found.items()}

    def _scale_site(self, block: DecoderBlock, site: Site, statistics: Statistics, scaler: Scaler) -> set[str]:
        """Fold the method's scale into the block; returns the tensors other than linears' weights that it changed."""
        fold = site.scaled_by
        if fold is None or not statistics.tokens:
            return set()
        prefix = self._config.block(block.index)
        schemes = {name: scheme for name in site.linears if (scheme := self._schemes[f"{prefix}.{name}"])}
        if not schemes:
            return set()
        coarsest = min(schemes.values(), key=lambda scheme: scheme.bits)
        weight_OI = torch.cat([block.tensors[f"{name}.weight"] for name in schemes])
        scale_I = scaler.scale(site, weight_OI, statistics, coarsest, lambda scale_I: tie_heads(scale_I, site))
        if scale_I is None:
            return set()
        dtype = self._checkpoint.tensors[f"{prefix}.{fold.name}.weight"].dtype
        statistics.divide(fold_scale(block, site, scale_I, dtype))
        plain = {f"{name}.weight" for name in site.linears if name not in schemes}
        return plain | {f"{fold.name}.weight", f"{fold.name}.bias"}

    def _enter(
        self,
        block: DecoderBlock,
        original: DecoderBlock,
        site: Site,
        shelf: Shelf,
        statistics: Statistics | None = None,
        part: _Part | None = None,
    ) -> None:
        """Walk all batches to the site's input, adding to `statistics` what the rounding wants of it."""

        def see(batch: Batch) -> None:
            if part is not None:
                part.note_peak(batch)
            # The original may route other tokens to an expert: there is nothing to compare with.
            ours, theirs = batch.ours, batch.original if site.expert is None else None
            if statistics is not None:
                statistics.take(
                    ours.site_input,
                    self._rounder.wanted,
                    original=None if theirs is None else theirs.site_input,
                    ahead=theirs.residual_BTH - ours.residual_BTH if theirs is not None and site.adds else None,
                    sample_every=self._sample_every,
                    each=self._map,
                )

        self._walk(shelf, lambda batch: batch.enter(block, original, site, self._tables), see)
        if statistics is not None and (event := _make_up(statistics.finish())) and part is not None:
            part.events.append(f"{self._config.block(block.index)}.{site.name}: {event}")

    def _leave(self, block: DecoderBlock, original: DecoderBlock, shelf: Shelf) -> None:
        self._walk(shelf, lambda batch: batch.leave(block, original))

    # -- rounding

    def _round_site(self, block: DecoderBlock, site: Site, statistics: Statistics, part: _Part) -> None:
        """Replace the site's weights in the block by their rounded selves; linears of one scheme go as one matrix."""
        prefix = self._config.block(block.index)
        schemes = [(name, scheme) for name in site.linears if (scheme := self._schemes[f"{prefix}.{name}"])]
        for scheme in dict.fromkeys(scheme for _, scheme in schemes):
            weights = {
                f"{prefix}.{name}": block.tensors[f"{name}.weight"] for name, other in schemes if other == scheme
            }
            values, rounding = self._round(weights, statistics, scheme, f"{prefix}.{site.name}", part)
            for name, value in values.items():
                block.tensors[f"{name.removeprefix(prefix)[1:]}.weight"] = value
                if rounding is not None:
                    block.input_transform[name.removeprefix(prefix)[1:]] = rounding

    def _round(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, scheme: Scheme, where: str, part: _Part
    ) -> tuple[dict[str, torch.Tensor], InputTransform | None]:
        """Round linears that read the same input, as one matrix; adds their encodings and errors to `part`.

        Returns their values and the rounding of their input, if it has one.
        """
        context = self._prepare(statistics, scheme)
        part.events += [f"{where}: {event}" for event in context.events]
        weight_OI, rows = torch.cat(list(weights.values())), [len(weight) for weight in weights.values()]
        aim_OI = context.aim(weight_OI)
        judged = max(1, min(rows) // _JUDGED_ROWS)  # every how many rows one's error is looked at

        def round_rows(wish_OI: torch.Tensor) -> tuple[Rounded, torch.Tensor]:
            rounded = context.round(wish_OI)
            sizes_2O = _row_sizes(rounded.dequantize() - wish_OI, wish_OI, statistics.hessian_II, judged)
            return replace(rounded, codes_OI=rounded.codes_OI.to(torch.uint8)), sizes_2O  # a quarter of the memory

        chunks = torch.split(aim_OI, rows if scheme.group_size == 0 else ROWS)
        done, sizes = zip(*self._map(round_rows, chunks), strict=True)
        rounded = Rounded.stack(done)
        input_scale = None if context.input_scale is None else context.input_scale(weight_OI)
        values: dict[str, torch.Tensor] = {}
        for name, own, sizes_2O in zip(
            weights, rounded.split(rows), torch.split(torch.cat(sizes, dim=1), rows, 1), strict=True
        ):
            values[name] = own.dequantize()
            error, whole = sizes_2O.sum(dim=1).clamp(min=0).tolist()
            part.errors[name] = math.sqrt(error / max(whole, 1e-30))
            stored = self._format.encode(own.export(), scheme, self._config.dtype, input_scale)
            part.tensors |= {f"{name}.{suffix}": to_torch(value) for suffix, value in stored.items()}
            part.stored_bits += sum(8 * value.array.nbytes for value in stored.values())
        return values, None if scheme.activations == "none" else input_rounding(scheme, input_scale)

    def _prepare(self, statistics: Statistics, scheme: Scheme) -> Context:
        """The site's rounding; an expert that saw no token is rounded to nearest, and told of."""
        if self._windows is not None and not statistics.tokens:
            event = "rounded to nearest: saw no calibration token"
            return Context(lambda weight_OI: rtn(weight_OI, scheme), events=(event,))
        return self._rounder.prepare(statistics, scheme)

    def _finish(self, shelf: Shelf) -> _Part:
        """The last shard: final norm and head, the head quantized if asked."""
        config, family, part = self._config, self._config.family, _Part()
        head_name = f"{family.head}.weight"
        part.tensors |= {name: self._checkpoint.source(name) for name in config.final_shapes()}
        if config.tie_embeddings:
            return part
        if (scheme := self._schemes[family.head]) is None:
            part.tensors[head_name] = self._checkpoint.source(head_name)
            return part
        norm, weight_OI = final_norm(self._checkpoint, config), load_float(self._checkpoint, head_name)
        statistics = Statistics()
        wanted = self._rounder.wanted | (self._scaler.wanted if self._scaler else frozenset())
        for number in shelf.numbers():
            batch = shelf.get(number)
            ours, theirs = (
                None if state is None else norm(state.residual_BTH) for state in (batch.ours, batch.original)
            )
            assert ours is not None
            statistics.take(ours, wanted, original=theirs, sample_every=self._sample_every, each=self._map)
        self._round({family.head: weight_OI}, statistics.finish(), scheme, family.head, part)
        return part

    # -- telling

    def _outcome(
        self,
        writer: CheckpointWriter,
        out: Path,
        journal: Journal,
        records: list[dict[str, Any]],
        choice: Mapping[str, Json] | None,
    ) -> Outcome:
        kv_cache = self._settings.common.kv_cache
        total = writer.finish(
            {**self._checkpoint.config, "quantization_config": self._format.config(self._schemes, kv_cache=kv_cache)}
        )
        for name, values in self._format.extra_files(self._schemes, kv_cache).items():
            write_json(out / name, values)
        copy_companions(self._checkpoint.path, out)
        journal.tidy()
        errors: dict[str, float] = {}
        for record in records:
            errors |= record["errors"]
        method = self._settings.common.method
        errors_report.write(
            out, errors, self._schemes, method={"smoothquant": "SmoothQuant"}.get(method, method.upper())
        )
        worst = max(errors, key=lambda name: errors[name])
        return Outcome(
            metrics={
                "weight_bytes": total,
                "bits_per_weight": round(sum(record["stored_bits"] for record in records) / self._weights(errors), 4),
                "calibration_tokens": 0 if self._windows is None else int(self._windows.size),
                "relative_error_mean": round(sum(errors.values()) / len(errors), 6),
                "relative_error_max": round(errors[worst], 6),
                "relative_error_max_linear": worst,
                **({} if choice is None else {"choice": dict(choice)}),
            },
            events=tuple(event for record in records for event in record["events"]),
        )

    def _tell(self, number: int, part: _Part, seconds: float) -> None:
        layers, block = self._config.layers, self._config.block(number - 1)
        facts: dict[str, Any] = {"stage": "quantize", "done": number, "total": layers, "block": block}
        errors = {name.removeprefix(f"{block}."): error for name, error in part.errors.items()}
        facts |= {"seconds": round(seconds, 3), "errors": errors, **memory.usage()}
        line = f"block {number}/{layers}"
        if errors:
            worst = max(errors, key=lambda name: errors[name])
            line += f": worst relative error {errors[worst]:.4f} in {worst}"
        self._progress(line, **facts)


def _make_up(statistics: Statistics) -> str | None:
    """Make up for fewer tokens than in-features, as an expert may see; returns what to tell of it.

    Too few tokens leave directions of the input that were never seen. What is missing of the rank is made up by the
    same share of an even Hessian, so that errors are not pushed into those directions.
    """
    hessian_II, tokens = statistics.hessian_II, statistics.tokens
    if hessian_II is None or not 0 < tokens < len(hessian_II):
        return None
    hessian_II.diagonal().add_((1 - tokens / len(hessian_II)) * hessian_II.diagonal().mean())
    return f"saw only {tokens} calibration tokens, made up for by an even Hessian"


def _row_sizes(
    error_OI: torch.Tensor, aim_OI: torch.Tensor, hessian_II: torch.Tensor | None, every: int
) -> torch.Tensor:
    """[2, O]: for one row in `every`, the squared size of the error and of the aim; zero for the others.

    The size is that of the outputs on the calibration inputs, or of the weights where there are none.
    """
    sizes_2O = torch.zeros(2, len(aim_OI))
    for size_O, each_OI in zip(sizes_2O, (error_OI[::every], aim_OI[::every]), strict=True):
        pushed_OI = each_OI if hessian_II is None else each_OI @ hessian_II
        size_O[::every] = (pushed_OI * each_OI).sum(dim=1)
    return sizes_2O


def _same(value: Writable, written: Checkpoint, name: str) -> bool:
    """Whether a tensor is the one that is stored under its name, bit by bit."""
    if name not in written.tensors:
        return False
    if isinstance(value, TensorInfo):
        return value.size == written.tensors[name].size and value.shape == written.tensors[name].shape
    theirs = written.tensor(name)
    return value.dtype == theirs.dtype and torch.equal(value.view(torch.uint8), theirs.view(torch.uint8))


def input_rounding(scheme: Scheme, input_scale: float | None) -> InputTransform:
    return int8_input(input_scale) if scheme.kind == "int" else fp8_input(input_scale)
