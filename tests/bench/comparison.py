"""One quantizer after another on the same model and the same token ids, each in a process of its own on one core.

What a peer came to is kept in `out/bench-quantize` (its checkpoint and its figures), under a digest of everything that
it depends on, so that a change of ours costs only our runs; LLMOPT_BENCH_FRESH=1 measures the peers again too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.models.text import read_tokens, windows
from llmopt.profiles import CALIBRATION_TEXT

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).resolve().parent / "peers"
KEPT = ROOT / "out" / "bench-quantize"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Of one run. CPU seconds of the quantization itself and of its whole process; `kl_mean` in nats, if evaluated."""

    core_cpu_s: float
    process_cpu_s: float
    peak_bytes: int
    model_bytes: int
    kl_mean: float | None


class Comparison:
    """Runs ours and theirs. `kept` holds what the peers came to."""

    def __init__(self, kept: Path, *, fresh: bool) -> None:
        self._kept, self._fresh = kept, fresh
        self._done: dict[str, Figures] = {}
        kept.mkdir(parents=True, exist_ok=True)

    def ids(self, model: Path, *, samples: int, seq_len: int, seed: int) -> Path:
        """A file of the calibration windows that `llmopt quantize` takes with these settings, [samples, seq_len]."""
        tokens = read_tokens(model, CALIBRATION_TEXT)
        found = windows(tokens, count=samples, length=seq_len, seed=seed, what="calibration text")
        file = self._kept / f"ids-{hashlib.sha256(found.tobytes()).hexdigest()[:16]}.npy"
        np.save(file, found)
        return file

    def ours(self, model: Path, arguments: Sequence[str], *, evaluate: bool = True) -> Figures:
        """`llmopt quantize MODEL` with these arguments and a new store; measured once in this session."""
        key = f"ours {model} {arguments}"
        if key not in self._done:
            with tempfile.TemporaryDirectory(dir=self._kept, prefix="ours-") as folder:
                job = {"arguments": ["quantize", str(model), *arguments, "--store", f"{folder}/store", "--json"]}
                said = _run(sys.executable, "run_llmopt.py", job, Path(folder))
                self._done[key] = self._figures(Path(json.loads(said)["path"]), Path(folder), model, evaluate)
        return self._done[key]

    def peer(self, peer: str, model: Path, ids: Path, settings: Mapping[str, Any], *, evaluate: bool = True) -> Figures:
        """The peer's runner with these settings; measured once for each version of everything that matters to it."""
        key = _digest(peer, model, ids, settings)
        if key not in self._done:
            folder = self._kept / f"{peer}-{key[:16]}"
            if self._fresh or not (folder / "figures.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                job = {**settings, "model": str(model), "ids": str(ids), "out": str(folder / "model")}
                _run(_python(peer), f"run_{peer}.py", job, folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(model / name, folder / "model" / name)
            self._done[key] = self._figures(folder / "model", folder, model, evaluate)
        return self._done[key]

    def checkpoint(self, peer: str, model: Path, ids: Path, settings: Mapping[str, Any]) -> Path:
        """The folder that the peer's run wrote."""
        self.peer(peer, model, ids, settings)
        return self._kept / f"{peer}-{_digest(peer, model, ids, settings)[:16]}" / "model"

    def _figures(self, made: Path, folder: Path, base: Path, evaluate: bool) -> Figures:
        measured = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        return Figures(
            core_cpu_s=measured["core_cpu_s"],
            process_cpu_s=measured["process_cpu_s"],
            peak_bytes=measured["peak_bytes"],
            model_bytes=sum(file.stat().st_size for file in made.glob("*.safetensors")),
            kl_mean=self._kl(made, base) if evaluate else None,
        )

    def _kl(self, made: Path, base: Path) -> float:
        """By `llmopt eval` for everyone, on the held-out text; a figure it has given before is in its store."""
        command = ["eval", made, "--against", base, "--json", "--quiet", "--store", self._kept / "store"]
        ran = subprocess.run(
            [sys.executable, "-m", "llmopt", *map(str, command)], capture_output=True, text=True, cwd=ROOT
        )
        if ran.returncode:
            raise RuntimeError(f"`llmopt eval {made}` failed: {ran.stderr[-2000:]}")
        return float(json.loads(ran.stdout)["metrics"]["kl_mean"])


def table(rows: Mapping[str, Figures], *, against: str) -> str:
    """One line a run; ratios to the run `against`."""
    base = rows[against]
    lines = [
        f"{'':34} {'core s':>7} {'ratio':>6} {'process s':>9} {'peak MB':>8} {'KL x 1e-3':>9} {'ratio':>6} {'MB':>8}"
    ]
    for name, row in rows.items():
        kl = f"{'':>9} {'':>6}"
        if row.kl_mean is not None and base.kl_mean is not None:
            kl = f"{row.kl_mean * 1e3:9.3f} {row.kl_mean / base.kl_mean:6.2f}"
        lines.append(
            f"{name:34} {row.core_cpu_s:7.1f} {row.core_cpu_s / base.core_cpu_s:6.2f} {row.process_cpu_s:9.1f} "
            f"{row.peak_bytes / 1e6:8.0f} {kl} {row.model_bytes / 1e6:8.2f}"
        )
    return "\n".join(lines)


def _python(peer: str) -> Path:
    python = ROOT / f".venv-{peer}" / "bin" / "python"
    if not python.is_file():
        raise RuntimeError(f"`{python}` is missing: `make .venv-{peer}/.ready` installs it")
    return python


def _run(python: str | Path, runner: str, job: Mapping[str, Any], folder: Path) -> str:
    """Run a runner on a job, in its folder (some leave logs behind); returns its stdout. One thread everywhere."""
    file = folder / "job.json"
    file.write_text(json.dumps({**job, "figures": str(folder / "figures.json")}), encoding="utf-8")
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    mine = {name: value for name, value in os.environ.items() if not name.startswith("LLMOPT_")}
    if python != sys.executable:
        mine.pop("PYTHONPATH", None)
    ran = subprocess.run(
        [str(python), str(PEERS / runner), str(file)], capture_output=True, text=True, cwd=folder, env=mine | threads
    )
    if ran.returncode:
        raise RuntimeError(f"`{runner}` failed on {job}:\n{ran.stdout[-1000:]}\n{ran.stderr[-3000:]}")
    return ran.stdout


def _digest(peer: str, model: Path, ids: Path, settings: Mapping[str, Any]) -> str:
    """Of the runner, the peer's versions, the model, the token ids and the settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    runner = [PEERS / f"run_{peer}.py", PEERS / "measuring.py", PEERS / f"{peer}.txt"]
    for file in (*runner, *sorted(model.glob("*.safetensors")), model / "config.json", ids):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
