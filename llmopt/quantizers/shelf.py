"""The calibration set on its way through the model: in memory while it fits, else in memory-mapped files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from llmopt.models.decoder import DecoderBlock, PositionTables, State
from llmopt.models.families import Site
from llmopt.models.writer import write_safetensors


@dataclass(frozen=True, slots=True)
class Batch:
    """Some windows: as the blocks quantized so far make them and, if asked for, as the original does.

    `half`: what linears read is kept in BF16, as they take it; the residual stream stays in float32.
    """

    ours: State
    original: State | None
    half: bool

    @classmethod
    def start(cls, ours: torch.Tensor, original: torch.Tensor | None, *, half: bool) -> Batch:
        return cls(State(ours, ours), None if original is None else State(original, original), half)

    def enter(self, block: DecoderBlock, original: DecoderBlock, site: Site, tables: PositionTables) -> Batch:
        theirs = None if self.original is None else self._narrow(original.enter(site, self.original, tables))
        return Batch(self._narrow(block.enter(site, self.ours, tables)), theirs, self.half)

    def leave(self, block: DecoderBlock, original: DecoderBlock) -> Batch:
        theirs = None if self.original is None else original.leave(self.original)
        return Batch.start(block.leave(self.ours), theirs, half=self.half)

    def _narrow(self, state: State) -> State:
        return replace(state, site_input=state.site_input.bfloat16()) if self.half else state

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything in it by name."""
        found: dict[str, torch.Tensor] = {}
        for role, state in (("ours", self.ours), ("original", self.original)):
            if state is not None:
                found[f"{role}.residual"] = state.residual_BTH
                if state.site_input is not state.residual_BTH:
                    found[f"{role}.input"] = state.site_input
                found |= {f"{role}.kept.{name}": tensor for name, tensor in state.kept.items()}
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], *, half: bool) -> Batch:
        """The inverse of `tensors`."""

        def state(role: str) -> State | None:
            residual, prefix = tensors.get(f"{role}.residual"), f"{role}.kept."
            if residual is None:
                return None
            kept = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            return State(residual, tensors.get(f"{role}.input", residual), kept)

        ours = state("ours")
        assert ours is not None
        return cls(ours, state("original"), half)


@dataclass
class Shelf:
    """Batches by number. What goes past `capacity_bytes` lies in a file of `folder` until it is put anew."""

    folder: Path
    capacity_bytes: int
    half: bool
    _kept: dict[int, Batch] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)
    spilled_bytes: int = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def numbers(self) -> list[int]:
        return sorted(self._sizes)

    def put(self, number: int, batch: Batch) -> None:
        """Replace the batch of this number."""
        self._kept.pop(number, None)
        size = sum(t.numel() * t.element_size() for t in batch.tensors().values())
        self._sizes[number] = size
        if sum(self._sizes[n] for n in self._kept) + size <= self.capacity_bytes:
            self._kept[number] = batch
            self._file(number).unlink(missing_ok=True)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(self._file(number), batch.tensors(), sync=False)
        self.spilled_bytes = max(self.spilled_bytes, sum(self._sizes[n] for n in self._sizes if n not in self._kept))

    def get(self, number: int) -> Batch:
        if number in self._kept:
            return self._kept[number]
        return read_batch(self._file(number), half=self.half)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def read_batch(file: Path, *, half: bool) -> Batch:
    """A batch whose tensors are mapped from its file: they cost no memory until they are read."""
    from safetensors.torch import load_file

    return Batch.of(load_file(file), half=half)
