"""Stream a checkpoint through a method: read a block, calibrate, quantize, pass its outputs on, write it, free it.

Each block runs once for GPTQ and rounding to nearest (a site's weights are replaced before their outputs are
computed), twice for AWQ and SmoothQuant, whose scales need the inputs of all sites first. Batches run on all cores
with one BLAS thread each, and are reduced in their order: the bytes do not depend on the number of cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmopt.artifacts.outcome import Outcome, Progress
from llmopt.formats.base import Stored
from llmopt.formats.dequantized import int8_input, load_block, load_float, to_torch
from llmopt.formats.reading import get_format, linears
from llmopt.formats.scheme import Scheme
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.companions import copy_companions
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import DecoderBlock, State, rms_norm, rotary_tables
from llmopt.models.families import Site
from llmopt.models.parallel import Workers
from llmopt.models.writer import CheckpointWriter, write_json
from llmopt.quantizers.base import Rounded, Statistics, exact_scale
from llmopt.quantizers.methods import Context, Scaler, method_of
from llmopt.quantizers.scaling import fold_scale, tie_heads
from llmopt.quantizers.settings import QuantizeSettings

_BATCH_TOKENS = 4096  # of one forward pass and one partial Hessian
_ROWS = 1024  # rounded together; fixed, so that the partition never depends on the machine


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some windows on their way: as the blocks quantized so far make them and, if asked for, as the original does."""

    ours: State
    original: State | None

    @classmethod
    def start(cls, ours: torch.Tensor, original: torch.Tensor | None) -> _Batch:
        return cls(State(ours, ours), None if original is None else State(original, original))

    def enter(
        self, block: DecoderBlock, original: DecoderBlock, site: Site, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> _Batch:
        theirs = None if self.original is None else original.enter(site, self.original, rotary)
        return _Batch(block.enter(site, self.ours, rotary), theirs)

    def leave(self, block: DecoderBlock, original: DecoderBlock) -> _Batch:
        return _Batch.start(block.leave(self.ours), None if self.original is None else original.leave(self.original))


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
    ) -> None:
        self._checkpoint, self._config, self._settings, self._progress = checkpoint, config, settings, progress
        self._windows, self._map = windows, workers.map
        self._scheme = settings.method.scheme
        self._format = get_format(settings.common.format)
        self._scaler, self._rounder = method_of(settings.method)
        self._events: list[str] = []
        self._errors: dict[str, float] = {}

    @torch.no_grad()
    def run(self, out: Path) -> Outcome:
        """Quantize every block in turn and write the checkpoint."""
        config, family = self._config, self._config.family
        writer = CheckpointWriter(out, config.layers + 2)
        writer.write({f"{family.embedding}.weight": self._checkpoint.tensor(f"{family.embedding}.weight")})
        batches = self._embed()
        if self._windows is not None:
            self._rotary = rotary_tables(config, self._windows.shape[1])
        for index in range(config.layers):
            tensors, batches = self._quantize_block(index, batches)
            writer.write(tensors)
            self._checkpoint.release()
            self._progress(f"block {index + 1}/{config.layers}: {self._summary(config.block(index))}")
        writer.write(self._finish(batches))
        return self._outcome(writer, out)

    def _embed(self) -> list[_Batch]:
        """The calibration windows as batches; none without calibration."""
        if self._windows is None:
            return []
        table = self._checkpoint.tensor(f"{self._config.family.embedding}.weight")
        ids = torch.from_numpy(self._windows)
        parts = torch.split(ids, max(1, _BATCH_TOKENS // ids.shape[1]))
        return [_Batch.start(x, x if self._rounder.compares else None) for x in (table[part].float() for part in parts)]

    def _quantize_block(self, index: int, batches: list[_Batch]) -> tuple[dict[str, torch.Tensor], list[_Batch]]:
        """The block's tensors for the disk, and its outputs on the calibration windows."""
        config, prefix = self._config, self._config.block(index)
        block = load_block(self._checkpoint, config, None, index)
        known: dict[str, Statistics] = {}
        folded: set[str] = set()
        if self._scaler is not None:
            known = self._observe(block, batches, self._scaler.wanted)
            for site in config.family.sites:
                folded |= self._scale_site(block, site, known[site.name], self._scaler)
        original = DecoderBlock(config, dict(block.tensors))
        stored: dict[str, Stored] = {}
        for site in config.family.sites:
            statistics = Statistics() if self._rounder.wanted else known.get(site.name, Statistics())
            batches = self._enter(block, original, site, batches, statistics)
            stored |= self._round_site(block, site, prefix, statistics)
        outputs = list(self._map(lambda batch: batch.leave(block, original), batches))
        tensors = {name: to_torch(value) for name, value in stored.items()}
        for name in config.block_shapes():
            if name.removesuffix(".weight") in self._linears():
                continue
            plain = self._checkpoint.tensor(f"{prefix}.{name}")
            tensors[f"{prefix}.{name}"] = block.tensors[name].to(plain.dtype) if name in folded else plain
        return tensors, outputs

    def _observe(self, block: DecoderBlock, batches: list[_Batch], wanted: frozenset[str]) -> dict[str, Statistics]:
        """Statistics of every site's input under the original weights."""
        found = {site.name: Statistics() for site in self._config.family.sites}

        def run(batch: _Batch) -> list[Statistics]:
            state, seen = batch.ours, []
            for site in self._config.family.sites:
                state = block.enter(site, state, self._rotary)
                seen.append(Statistics.of(state.site_input, wanted))
            return seen

        for seen in self._map(run, batches):
            for statistics, part in zip(found.values(), seen, strict=True):
                statistics.add(part)
        return found

    def _scale_site(self, block: DecoderBlock, site: Site, statistics: Statistics, scaler: Scaler) -> set[str]:
        """Fold the method's scale into the block; returns the tensors other than linears' weights that it changed."""
        weight_OI = torch.cat([block.tensors[f"{name}.weight"] for name in site.linears])
        scale_I = scaler.scale(site, weight_OI, tie_heads(statistics, site, self._config))
        if scale_I is None:
            return set()
        dtype = self._checkpoint.tensors[f"{self._config.block(0)}.{site.scaled_by}.weight"].dtype
        scale_I = fold_scale(block, site, scale_I, self._config, dtype)
        if statistics.hessian_II is not None:
            statistics.hessian_II /= torch.outer(scale_I, scale_I)
        return {f"{site.scaled_by}.weight", f"{site.scaled_by}.bias"}

    def _enter(
        self, block: DecoderBlock, original: DecoderBlock, site: Site, batches: list[_Batch], statistics: Statistics
    ) -> list[_Batch]:
        """Walk all batches to the site's input, adding to `statistics` what the rounding wants of it."""
        wanted = self._rounder.wanted

        def run(batch: _Batch) -> tuple[_Batch, Statistics]:
            batch = batch.enter(block, original, site, self._rotary)
            ours, theirs = batch.ours, batch.original
            if theirs is None:
                return batch, Statistics.of(ours.site_input, wanted)
            ahead = theirs.residual_BTH - ours.residual_BTH if site.adds else None
            return batch, Statistics.of(ours.site_input, wanted, theirs.site_input, ahead)

        moved = []
        for batch, part in self._map(run, batches):
            moved.append(batch)
            statistics.add(part)
        return moved

    def _round_site(self, block: DecoderBlock, site: Site, prefix: str, statistics: Statistics) -> dict[str, Stored]:
        """Replace the site's weights in the block by their rounded selves; returns their encoding."""
        rows = [len(block.tensors[f"{name}.weight"]) for name in site.linears]
        weight_OI = torch.cat([block.tensors[f"{name}.weight"] for name in site.linears])
        aim_OI, rounded = self._round(weight_OI, statistics, f"{prefix}.{site.name}")
        input_scale = None
        if self._scheme.activations == "static" and statistics.abs_max_I is not None:
            input_scale = float(exact_scale(statistics.abs_max_I.max() / 127.5))
        stored: dict[str, Stored] = {}
        for name, wanted_OI, part in zip(site.linears, torch.split(aim_OI, rows), rounded.split(rows), strict=True):
            block.tensors[f"{name}.weight"] = part.dequantize()
            if self._scheme.activations != "none":
                block.input_transform[name] = int8_input(input_scale)
            self._note_error(f"{prefix}.{name}", block.tensors[f"{name}.weight"], wanted_OI, statistics)
            stored |= self._encode(f"{prefix}.{name}", part, input_scale)
        return stored

    def _round(self, weight_OI: torch.Tensor, statistics: Statistics, where: str) -> tuple[torch.Tensor, Rounded]:
        """What the rounding aimed at, and what came out."""
        context: Context = self._rounder.prepare(statistics)
        self._events += [f"{where}: {event}" for event in context.events]
        aim_OI = context.aim(weight_OI)
        return aim_OI, Rounded.stack(list(self._map(context.round, torch.split(aim_OI, _ROWS))))

    def _encode(self, prefix: str, rounded: Rounded, input_scale: float | None) -> dict[str, Stored]:
        tensors = self._format.encode(rounded.export(), self._scheme, self._config.dtype, input_scale)
        return {f"{prefix}.{suffix}": value for suffix, value in tensors.items()}

    def _finish(self, batches: list[_Batch]) -> dict[str, torch.Tensor]:
        """The last shard: final norm and head, the head quantized if asked."""
        config, family = self._config, self._config.family
        tensors = {f"{family.final_norm}.weight": self._checkpoint.tensor(f"{family.final_norm}.weight")}
        if config.tie_embeddings:
            return tensors
        name = f"{family.head}.weight"
        if not self._settings.common.lm_head:
            return tensors | {name: self._checkpoint.tensor(name)}
        norm, weight_OI = (
            load_float(self._checkpoint, f"{family.final_norm}.weight"),
            load_float(self._checkpoint, name),
        )
        statistics = Statistics()
        wanted = self._rounder.wanted | (self._scaler.wanted if self._scaler else frozenset())

        def run(batch: _Batch) -> Statistics:
            ours, theirs = (
                None if state is None else rms_norm(state.residual_BTH, norm, config.norm_eps)
                for state in (batch.ours, batch.original)
            )
            assert ours is not None
            return Statistics.of(ours, wanted, theirs)

        for part in self._map(run, batches):
            statistics.add(part)
        aim_OI, rounded = self._round(weight_OI, statistics, family.head)
        self._note_error(family.head, rounded.dequantize(), aim_OI, statistics)
        scale = None
        if self._scheme.activations == "static" and statistics.abs_max_I is not None:
            scale = float(exact_scale(statistics.abs_max_I.max() / 127.5))
        return tensors | {n: to_torch(v) for n, v in self._encode(family.head, rounded, scale).items()}

    def _outcome(self, writer: CheckpointWriter, out: Path) -> Outcome:
        head = self._config.family.head
        schemes: dict[str, Scheme | None] = dict.fromkeys(linears(self._config), self._scheme)
        if not self._settings.common.lm_head:
            schemes[head] = None
        config = {k: v for k, v in self._checkpoint.config.items() if k != "quantization_config"}
        config["quantization_config"] = self._format.config(schemes)
        total = writer.finish(config)
        for name, values in self._format.extra_files(schemes).items():
            write_json(out / name, values)
        copy_companions(self._checkpoint.path, out)
        errors = list(self._errors.values())
        worst = max(self._errors, key=lambda name: self._errors[name])
        return Outcome(
            metrics={
                "weight_bytes": total,
                "calibration_tokens": 0 if self._windows is None else int(self._windows.size),
                "relative_error_mean": round(sum(errors) / len(errors), 6),
                "relative_error_max": round(self._errors[worst], 6),
                "relative_error_max_linear": worst,
            },
            events=tuple(self._events),
        )

    def _note_error(self, name: str, rounded_OI: torch.Tensor, aim_OI: torch.Tensor, statistics: Statistics) -> None:
        """Relative error of the linear's output on the calibration inputs, or of its weight where there are none."""
        hessian_II = statistics.hessian_II

        def size(matrix_OI: torch.Tensor) -> torch.Tensor:
            return (matrix_OI if hessian_II is None else matrix_OI @ hessian_II).mul(matrix_OI).sum()

        self._errors[name] = float((size(rounded_OI - aim_OI) / size(aim_OI).clamp(min=1e-30)).clamp(min=0).sqrt())

    def _summary(self, prefix: str) -> str:
        errors = {name: error for name, error in self._errors.items() if name.startswith(prefix + ".")}
        worst = max(errors, key=lambda name: errors[name])
        return f"worst relative error {errors[worst]:.4f} in {worst.removeprefix(prefix + '.')}"

    def _linears(self) -> frozenset[str]:
        return frozenset(name for site in self._config.family.sites for name in site.linears)
