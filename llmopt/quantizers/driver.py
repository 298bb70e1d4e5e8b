"""Stream a checkpoint through a method: read a block, calibrate, quantize, pass its outputs on, write it, free it.

Each block runs once: for GPTQ and rounding to nearest a site's weights are replaced before their outputs are computed;
AWQ and SmoothQuant, whose scales need the inputs of all sites first, calibrate on the original model's. Batches run on
all cores with one BLAS thread each, and are reduced in their order: the bytes do not depend on the number of cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmopt.artifacts.outcome import Outcome, Progress
from llmopt.formats.base import Stored, store_float
from llmopt.formats.dequantized import int8_input, load_block, load_float
from llmopt.formats.reading import get_format
from llmopt.formats.scheme import Scheme
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.companions import copy_companions
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import DecoderBlock, State, rms_norm, rotary_tables
from llmopt.models.families import Site
from llmopt.models.parallel import Workers
from llmopt.models.writer import CheckpointWriter
from llmopt.quantizers.base import Rounded, Statistics, sample_every
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
        self._format = get_format(settings.common.format)
        self._scaler, self._rounder = method_of(settings.method)
        self._sample_every = 1 if windows is None else sample_every(windows.size)
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
        passed_on: list[_Batch] = []
        if self._scaler is not None:
            known, passed_on = self._observe(block, batches, self._scaler.wanted)
            for site in config.family.sites:
                folded |= self._scale_site(block, site, prefix, known[site.name], self._scaler)
        once = self._scaler is not None and not self._rounder.wanted  # the scaler has seen all there is to see
        original = DecoderBlock(config, dict(block.tensors))
        stored: dict[str, Stored] = {}
        for site in config.family.sites:
            statistics = Statistics() if self._rounder.wanted else known.get(site.name, Statistics())
            if not once:
                batches = self._enter(block, original, site, batches, statistics)
            stored |= self._round_site(block, site, prefix, statistics)
        outputs = passed_on if once else list(self._map(lambda batch: batch.leave(block, original), batches))
        tensors = {name: to_torch(value) for name, value in stored.items()}
        for name in config.block_shapes():
            if name.removesuffix(".weight") in self._linears():
                continue
            plain = self._checkpoint.tensor(f"{prefix}.{name}")
            tensors[f"{prefix}.{name}"] = block.tensors[name].to(plain.dtype) if name in folded else plain
        return tensors, outputs

    def _observe(
        self, block: DecoderBlock, batches: list[_Batch], wanted: frozenset[str]
    ) -> tuple[dict[str, Statistics], list[_Batch]]:
        """Statistics of every site's input under the original weights, and the block's outputs under them."""
        found, passed_on = {site.name: Statistics() for site in self._config.family.sites}, []

        def run(batch: _Batch) -> tuple[list[Statistics], _Batch]:
            state, seen = batch.ours, []
            for site in self._config.family.sites:
                state = block.enter(site, state, self._rotary)
                seen.append(Statistics.of(state.site_input, wanted, sample_every=self._sample_every))
            return seen, _Batch.start(block.leave(state), None)

        for seen, output in self._map(run, batches):
            passed_on.append(output)
            for statistics, part in zip(found.values(), seen, strict=True):
                statistics.add(part)
        return found, passed_on

    def _scale_site(
        self, block: DecoderBlock, site: Site, prefix: str, statistics: Statistics, scaler: Scaler
    ) -> set[str]:
        """Fold the method's scale into the block; returns the tensors other than linears' weights that it changed."""
        schemes = {name: self._settings.scheme_of(f"{prefix}.{name}") for name in site.linears}
        scheme = min((s for s in schemes.values() if s is not None), key=lambda s: s.bits, default=None)
        if scheme is None:
            return set()
        weight_OI = torch.cat([block.tensors[f"{name}.weight"] for name in site.linears if schemes[name] is not None])
        scale_I = scaler.scale(
            site, weight_OI, statistics, scheme, lambda scale_I: tie_heads(scale_I, site, self._config)
        )
        if scale_I is None:
            return set()
        dtype = self._checkpoint.tensors[f"{self._config.block(0)}.{site.scaled_by}.weight"].dtype
        statistics.divide(fold_scale(block, site, scale_I, self._config, dtype))
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
                return batch, Statistics.of(ours.site_input, wanted, sample_every=self._sample_every)
            ahead = theirs.residual_BTH - ours.residual_BTH if site.adds else None
            return batch, Statistics.of(
                ours.site_input, wanted, theirs.site_input, ahead, sample_every=self._sample_every
            )

        moved = []
        for batch, part in self._map(run, batches):
            moved.append(batch)
            statistics.add(part)
        return moved

    def _round_site(self, block: DecoderBlock, site: Site, prefix: str, statistics: Statistics) -> dict[str, Stored]:
        """Replace the site's weights in the block by their rounded selves; returns their encoding."""
        alike: dict[Scheme | None, list[str]] = {}
        for name in site.linears:
            alike.setdefault(self._settings.scheme_of(f"{prefix}.{name}"), []).append(name)
        stored: dict[str, Stored] = {}
        for scheme, names in alike.items():
            if scheme is None:
                stored |= self._keep(block, names, prefix)
                continue
            rows = [len(block.tensors[f"{name}.weight"]) for name in names]
            weight_OI = torch.cat([block.tensors[f"{name}.weight"] for name in names])
            aim_OI, rounded, scale = self._round(weight_OI, statistics, scheme, f"{prefix}.{site.name}", rows)
            for name, wanted_OI, part in zip(names, torch.split(aim_OI, rows), rounded.split(rows), strict=True):
                block.tensors[f"{name}.weight"] = part.dequantize()
                if scheme.activations != "none":
                    block.input_transform[name] = int8_input(scale)
                self._note_error(f"{prefix}.{name}", block.tensors[f"{name}.weight"], wanted_OI, statistics)
                stored |= self._encode(f"{prefix}.{name}", part, scale)
        return stored

    def _keep(self, block: DecoderBlock, names: list[str], prefix: str) -> dict[str, Stored]:
        """Leave linears plain, as the scales that were folded into them have made them."""
        stored: dict[str, Stored] = {}
        for name in names:
            kept = block.tensors[f"{name}.weight"].numpy()
            dtype = self._checkpoint.tensors[f"{prefix}.{name}.weight"].dtype
            stored[f"{prefix}.{name}.weight"] = store_float(kept, dtype)
        return stored

    def _round(
        self, weight_OI: torch.Tensor, statistics: Statistics, scheme: Scheme, where: str, rows: list[int]
    ) -> tuple[torch.Tensor, Rounded, float | None]:
        """What the rounding aimed at, what came out, and the static scale of the input."""
        context: Context = self._rounder.prepare(statistics, scheme)
        self._events += [f"{where}: {event}" for event in context.events]
        aim_OI = context.aim(weight_OI)
        parts = torch.split(aim_OI, rows if scheme.group_size == 0 else _ROWS)
        scale = None if context.input_scale is None else context.input_scale(weight_OI)
        return aim_OI, Rounded.stack(list(self._map(context.round, parts))), scale

    def _encode(self, prefix: str, rounded: Rounded, input_scale: float | None) -> dict[str, Stored]:
        tensors = self._format.encode(rounded.export(), rounded.scheme, self._config.dtype, input_scale)
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
            return Statistics.of(ours, wanted, theirs, sample_every=self._sample_every)

        for part in self._map(run, batches):
            statistics.add(part)
        scheme = self._settings.scheme_of(family.head)
        if scheme is None:
            return tensors | {name: self._checkpoint.tensor(name)}
        aim_OI, rounded, scale = self._round(weight_OI, statistics, scheme, family.head, [len(weight_OI)])
        self._note_error(family.head, rounded.dequantize(), aim_OI, statistics)
        return tensors | {n: to_torch(v) for n, v in self._encode(family.head, rounded, scale).items()}

    def _outcome(self, writer: CheckpointWriter, out: Path) -> Outcome:
        head = self._settings.common.lm_head
        config = {k: v for k, v in self._checkpoint.config.items() if k != "quantization_config"}
        config["quantization_config"] = self._format.config(self._settings.method.scheme, head=head)
        total = writer.finish(config)
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


def to_torch(stored: Stored) -> torch.Tensor:
    """A tensor for safetensors from the bits of an encoding."""
    tensor = torch.from_numpy(stored.array)
    return tensor.view(torch.bfloat16) if stored.dtype == "BF16" else tensor
