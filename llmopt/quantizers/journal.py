"""What a quantization has finished, durable: after a kill the same run goes on from the last finished block.

A part is the embedding (0), a block (1 to the number of blocks) or the tensors after the last block. A part counts once
its shard and the record of it are on disk; the record holds the shard's sha256, so a torn or damaged shard counts for
nothing. The activations that enter a block are kept only now and then: without them the finished blocks are run again,
forward only, and give the very same activations.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmopt.artifacts.digest import sha256_file
from llmopt.artifacts.outcome import Json
from llmopt.models.writer import write_safetensors
from llmopt.quantizers.shelf import Batch, Shelf, read_batch


@dataclass
class Journal:
    """Lives in `folder`, a hidden one within the run's output folder."""

    folder: Path
    save_after_s: float  # work between two savings of the activations
    _saved_at: float = field(default_factory=time.monotonic)

    def finished(self, shards: list[Path]) -> list[dict[str, Any]]:
        """The records of the parts finished so far, in order."""
        records: list[dict[str, Any]] = []
        for number, shard in enumerate(shards):
            record = _read(self.folder / f"{number:05d}.json")
            if record is None or not shard.is_file() or sha256_file(shard) != record.get("sha256"):
                break
            records.append(record)
        return records

    def record(self, number: int, sha256: str, facts: Mapping[str, Json]) -> None:
        """Part `number` is finished; its shard is on disk already."""
        self.note(f"{number:05d}", {"sha256": sha256, **facts})

    def note(self, name: str, content: Mapping[str, Json]) -> None:
        """Keep something else that the rest of the run depends on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f"{name}.json.part"
        with aside.open("w", encoding="utf-8") as stream:
            json.dump(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(self.folder / f"{name}.json")
        _sync(self.folder)
        _sync(self.folder.parent)

    def noted(self, name: str) -> dict[str, Any] | None:
        return _read(self.folder / f"{name}.json")

    def save(self, block: int, shelf: Shelf) -> None:
        """Keep the activations that enter `block`, in place of those kept before, if enough work lies in them."""
        if time.monotonic() - self._saved_at < self.save_after_s:
            return
        aside, target = self.folder / "activations.part", self.folder / f"activations-{block:05d}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        digests = {
            f"{number:06d}.safetensors": write_safetensors(
                aside / f"{number:06d}.safetensors", shelf.get(number).tensors()
            )
            for number in shelf.numbers()
        }
        (aside / "digests.json").write_text(json.dumps(digests), encoding="utf-8")
        _sync(aside)
        aside.replace(target)
        _sync(self.folder)
        for older in self.folder.glob("activations-*"):
            if older != target:
                shutil.rmtree(older)
        self._saved_at = time.monotonic()

    def saved(self, last: int, *, half: bool) -> tuple[int, list[Batch]] | None:
        """The newest activations kept that enter a block up to `last`, and that block; None where there are none."""
        for folder in sorted(self.folder.glob("activations-*"), reverse=True):
            digests, block = _read(folder / "digests.json"), int(folder.name.removeprefix("activations-"))
            if digests is not None and block <= last and _whole(folder, digests):
                return block, [read_batch(folder / name, half=half) for name in sorted(digests)]
        return None

    def tidy(self) -> None:
        """Every part is finished: leave the records alone."""
        for folder in [path for path in self.folder.iterdir() if path.is_dir()]:
            shutil.rmtree(folder, ignore_errors=True)
        for left in self.folder.parent.glob("*.part"):
            left.unlink()


def _whole(folder: Path, digests: Mapping[str, str]) -> bool:
    return all((folder / name).is_file() and sha256_file(folder / name) == digests[name] for name in digests)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
