"""Quantize in children that are killed (SIGKILL) at random times, each going on from the last; run by test_resume.py.

Arguments: model, calibration set, store, settings as JSON, seed, kills, seconds of an undisturbed run. Prints JSON.
"""

from __future__ import annotations

import itertools
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
from llmopt.quantizers import driver  # noqa: F401  # before the fork: not once a child


def stage(model: Path, calibration: Path, settings: dict[str, Any]) -> runner.Stage:
    """As pipeline.stages.quantize, but so that activations are saved after every block or never."""
    execution = quantizers.Execution(bfloat16=settings.pop("bfloat16"), save_after_s=settings.pop("save_after_s"))
    resolved = quantizers.resolve(settings)

    def work(out: Path, progress: Progress) -> Outcome:
        return quantizers.quantize(model, resolved, calibration, out, progress, execution)

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
    model, calibration, root, settings, seed, kills, seconds = sys.argv[1:]
    draw, killed, went_on, ids = random.Random(int(seed)), 0, 0, []
    work = stage(Path(model), Path(calibration), json.loads(settings))
    for attempt in itertools.count():
        store = Store(Path(root) / str(attempt))
        while True:
            started = time.monotonic()
            went_on += len(list((store.root / "begun").rglob(".begun/0*.json"))) > 1
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
        ids += store.results(work.action.key)
        if killed >= int(kills):
            break
    with store.stage():  # as any writer does, it removes what the dead have left
        pass
    left = [str(path) for folder in ("begun", "tmp") for path in (store.root / folder).rglob("*") if path.is_file()]
    report = {"ids": sorted(set(ids)), "killed": killed, "went_on": went_on, "left": left}
    print(json.dumps(report | {"seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
