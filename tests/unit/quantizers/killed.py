"""Quantize in a child that is killed (SIGKILL) at random times, until one comes through; run by test_resume.py.

Arguments: model, text, store, settings as JSON, seed, kills, seconds that an undisturbed run takes. Prints JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llmopt import quantizers
from llmopt.artifacts import Store, describe
from llmopt.artifacts.manifest import Action
from llmopt.artifacts.outcome import Outcome, Progress, silent
from llmopt.pipeline import runner


def stage(model: Path, text: Path, settings: dict[str, Any]) -> runner.Stage:
    """As pipeline.stages.quantize, but so that activations are saved after every block or never."""
    execution = quantizers.Execution(bfloat16=settings.pop("bfloat16"), save_after_s=settings.pop("save_after_s"))
    resolved = quantizers.resolve(settings)

    def work(out: Path, progress: Progress) -> Outcome:
        return quantizers.quantize(model, resolved, text, out, progress, execution)

    action = Action(
        op="quantize",
        op_version=1,
        inputs={"model": describe(model, "model").id},
        settings=resolved.to_json(),
        code="sha256:0",
        deps={},
        target={},
    )
    return runner.Stage(kind="quantized-model", action=action, check=lambda: None, produce=work, resumable=True)


def main() -> None:
    torch.set_num_threads(1)
    model, text, root, settings, seed, kills, seconds = sys.argv[1:]
    draw, killed, goes_on = random.Random(int(seed)), 0, 0
    work, store = stage(Path(model), Path(text), json.loads(settings)), Store(Path(root))
    while True:
        begun = sorted((store.root / "begun").rglob("*.begun/0*.json"))
        goes_on += len(begun) > 1
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            runner.run(store, work, silent)
            os._exit(0)
        if killed < int(kills):
            time.sleep(draw.random() * float(seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            break
        killed += 1
    left = [str(path) for folder in ("begun", "tmp") for path in (store.root / folder).rglob("*") if path.is_file()]
    report = {"ids": store.results(work.action.key), "killed": killed, "went_on": goes_on, "left": left}
    print(json.dumps(report | {"seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
