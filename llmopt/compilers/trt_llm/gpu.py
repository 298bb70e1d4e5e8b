"""The NVIDIA GPUs of this machine, as the driver tells them; nothing here loads CUDA.

`nvidia-smi` says everything that a build has to know. Where it is not installed (some containers), the kernel driver's
folder still has the names.
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llmopt.artifacts.outcome import Json

_DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")
_FIELDS = ("index", "uuid", "name", "memory.total", "driver_version", "compute_cap")
_TIMEOUT_S = 30.0  # without its persistence daemon the driver takes seconds to wake a large machine's GPUs


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device; None where the driver did not say. capability: CUDA's, "9.0"."""

    name: str
    uuid: str | None = None
    memory_mib: int | None = None
    driver: str | None = None
    capability: str | None = None

    @property
    def architecture(self) -> str | None:
        """As TensorRT-LLM's builds name it: "sm_90"."""
        return None if self.capability is None else "sm_" + self.capability.replace(".", "")

    def to_json(self) -> dict[str, Json]:
        return {**asdict(self), "architecture": self.architecture}


@dataclass(frozen=True, slots=True)
class Probe:
    """The GPUs that a CUDA program started here would see, and what was asked to find them, in words."""

    gpus: tuple[Gpu, ...]
    tried: tuple[str, ...]

    def of(self, architecture: str | None) -> tuple[Gpu, ...]:
        """Those of one architecture; None: all."""
        return tuple(gpu for gpu in self.gpus if architecture in (None, gpu.architecture))

    def __str__(self) -> str:
        """For a message: what is here, or what was tried."""
        if not self.gpus:
            return "; ".join(self.tried)
        kinds = Counter(f"{gpu.name} ({gpu.architecture or 'architecture unknown'})" for gpu in self.gpus)
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def probe(environment: Mapping[str, str] = os.environ) -> Probe:
    """Ask the driver. `CUDA_VISIBLE_DEVICES` of `environment` counts, as it will for the build."""
    found, tried = _ask()
    if not found:
        found, said = _drivers_folder()
        tried = [*tried, said]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not found:
        return Probe(tuple(found), tuple(tried))
    kept = _visible(found, visible)
    said = f"`CUDA_VISIBLE_DEVICES={visible}` shows {len(kept)} of {len(found)}"
    return Probe(tuple(kept), (*tried, said))


def _ask() -> tuple[list[Gpu], list[str]]:
    """What nvidia-smi answers; drivers before 510 do not know compute capabilities, so ask once more without."""
    tried: list[str] = []
    for fields in (_FIELDS, _FIELDS[:-1]):
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except FileNotFoundError:
            return [], ["`nvidia-smi` is not installed"]
        except (OSError, subprocess.SubprocessError) as error:
            return [], [f"`nvidia-smi` did not answer: {error}"]
        if answer.returncode == 0:
            rows = [_row(line, fields) for line in answer.stdout.splitlines()]
            return [gpu for gpu in rows if gpu is not None], [*tried, "`nvidia-smi` was asked"]
        words = " ".join((answer.stdout + answer.stderr).split()) or f"exit code {answer.returncode}"
        tried = [f"`nvidia-smi` failed: {words[:300]}"]
    return [], tried


def _row(line: str, fields: Sequence[str]) -> Gpu | None:
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(fields):
        return None
    said = {field: value for field, value in zip(fields, values, strict=True) if not value.startswith("[")}  # [N/A]
    memory = said.get("memory.total", "")
    return Gpu(
        name=said.get("name", "unknown GPU"),
        uuid=said.get("uuid"),
        memory_mib=int(memory) if memory.isdigit() else None,
        driver=said.get("driver_version"),
        capability=said.get("compute_cap"),
    )


def _drivers_folder() -> tuple[list[Gpu], str]:
    found = []
    for file in sorted(_DRIVER_FOLDER.glob("*/information")):
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        lines = (line.partition(":") for line in text.splitlines())
        names = [value.strip() for key, _, value in lines if key.strip() == "Model"]
        found.append(Gpu(name=names[0] if names else "unknown GPU"))
    return found, f"`{_DRIVER_FOLDER}` has {len(found) or 'no'} GPU" + ("s" if len(found) > 1 else "")


def _visible(gpus: Sequence[Gpu], setting: str) -> list[Gpu]:
    """By CUDA's rules: a list of numbers or of beginnings of UUIDs, read up to the first that names nothing.

    Numbers are taken in nvidia-smi's order, which is CUDA's wherever all GPUs are alike. Parts of a GPU (MIG) are not
    in that list: their GPUs cannot be told apart here, so all are kept.
    """
    if "MIG-" in setting:
        return list(gpus)
    kept: list[Gpu] = []
    for word in setting.split(","):
        word = word.strip()
        matching = [gpu for gpu in gpus if gpu.uuid and word.startswith("GPU-") and gpu.uuid.startswith(word)]
        if word.isdigit() and int(word) < len(gpus):
            matching = [gpus[int(word)]]
        if len(matching) != 1 or matching[0] in kept:
            break
        kept += matching
    return kept
