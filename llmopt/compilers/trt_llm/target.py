"""The target `tensorrt-llm`: a plan, then all that the build needs, written and validated without a GPU."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmopt.artifacts.outcome import Json, Outcome, Progress
from llmopt.compilers import deploy
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.models.companions import companions, copy_companions, write_json

if TYPE_CHECKING:
    from llmopt.compilers.trt_llm.build import Site
    from llmopt.compilers.trt_llm.plan import Plan

#: What of a prepared artifact goes with the engine: what serves it, never what else lies in the user's folder.
_FOR_SERVING = (
    *("model", "deploy", "plan.json", "commands.json", "serve.yaml", "serve.sh", "health.sh", "config.json"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRTLLM(Settings):
    """`Settings` with the stages as methods; what they make is the same on every machine."""

    portable: ClassVar[bool] = True

    def deps(self) -> tuple[str, ...]:
        return ("numpy", "safetensors")

    def check(self, model: Path) -> None:
        from llmopt.compilers.trt_llm import plan

        deploy.emit(self.emit, plan.deployment(plan.make(model, self)))

    def plan(self, model: Path, out: Path, progress: Progress) -> Outcome:
        from llmopt.compilers.trt_llm import plan

        made = plan.make(model, self)
        said = made.to_json()
        write_json(out / "plan.json", said)
        memory = said["memory"]
        assert isinstance(memory, dict)
        return Outcome(metrics={**plan.facts(made), **memory})

    def prepare(self, model: Path, plan: Path, out: Path, progress: Progress) -> Outcome:
        from llmopt.compilers.trt_llm import commands, rules, validate
        from llmopt.compilers.trt_llm.plan import deployment, facts, make

        made = make(model, self)
        _check_space(out, sum(made.rank_bytes))
        shutil.copyfile(plan / "plan.json", out / "plan.json")
        events = _write_weights(model, made, out, progress)
        paged = rules.has_paged_context(made.settings, quant_algo=made.quant_algo, kv_cache=made.kv_cache)
        for name, text in commands.files(made.settings, paged_context=paged).items():
            _write(out / name, text)
        for name, text in deploy.emit(self.emit, deployment(made)).items():
            _write(out / name, text)
        write_json(out / "engine.json", _describe(model, made))
        progress("validating what was written")
        report = validate.validate(out, record=True)
        return Outcome(
            status="prepared",
            metrics={"runtime": "TensorRT-LLM", **facts(made), "validated": report.to_json()},
            events=events,
        )


def build(site: Site, out: Path, progress: Progress) -> Outcome:
    """The engine of a prepared artifact, made and looked at by `build.run`, with what serves it.

    What was seen on the way (the log, how long it took, what the server answered) is no part of the engine.
    """
    from llmopt.compilers.trt_llm.build import run

    prepared = site.artifact.path
    observed = run(site, out, progress=progress)
    log = out / "build.log"
    byproducts = {"build.log": log.read_text(encoding="utf-8", errors="replace")}
    log.unlink()
    if observed:
        byproducts["observed.json"] = json.dumps(observed, indent=2)
    for name in (*_FOR_SERVING, *companions(prepared)):
        if (prepared / name).exists():
            _link(prepared / name, out / name)
    if (out / "engine").is_dir():
        copy_companions(prepared, out / "engine")  # so that a server can be given this folder alone
    said = json.loads((prepared / "engine.json").read_text(encoding="utf-8"))
    about: dict[str, Json] = {
        "architecture": site.gpus[0].architecture,
        "gpu": site.gpus[0].name,
        "driver": site.gpus[0].driver,
        "versions": dict(site.versions),
    }
    write_json(out / "engine.json", {**said, **about, "status": "compiled"})
    metrics = {"runtime": "TensorRT-LLM", "mode": said["mode"], "version": said["version"], **about}
    return Outcome(status="compiled", metrics=metrics, byproducts=byproducts)


def _check_space(out: Path, size: int) -> None:
    """OSError of a full disk, before the first byte and not after the minutes that most of them take."""
    if shutil.disk_usage(out).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))


def _write_weights(model: Path, made: Plan, out: Path, progress: Progress) -> tuple[str, ...]:
    """`checkpoint/` with the tokenizer beside it, or `model/`; returns what changed numbers."""
    from llmopt.compilers.trt_llm import bundle, checkpoint
    from llmopt.formats.reading import open_model

    folder = out / ("model" if made.engine is None else "checkpoint")
    folder.mkdir()
    if made.engine is None:
        return bundle.write(model, folder, made.settings, progress)
    source = open_model(model)
    copy_companions(model, out)
    # The tokenizer's class may be told by config.json alone; of the weights' encoding it must not speak.
    plain = {key: value for key, value in source.checkpoint.config.items() if key != "quantization_config"}
    write_json(out / "config.json", plain)
    return checkpoint.write(source, made.engine, folder, progress)


def _describe(model: Path, made: Plan) -> dict[str, Json]:
    """engine.json."""
    from llmopt.compilers.trt_llm.plan import facts
    from llmopt.formats.reading import open_model

    config, settings = open_model(model).config, made.settings
    return {
        "schema": "llmopt.engine/1",
        "target": "tensorrt-llm",
        "status": "prepared",
        **facts(made),
        "max_batch_size": settings.max_batch_size,
        "max_input_len": settings.max_input_len,
        "max_seq_len": settings.max_seq_len,
        "max_num_tokens": settings.max_num_tokens,
        "model_type": config.family.model_type,
        "vocab_size": config.vocab_size,
        "max_context_tokens": settings.max_seq_len,
    }


def _link(source: Path, target: Path) -> None:
    """A file or a folder once more, without a copy of its bytes where the disk allows that."""

    def one(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=True)
        except OSError:
            shutil.copyfile(source, target)

    if source.is_dir():
        shutil.copytree(source, target, copy_function=one)
    else:
        one(str(source), str(target))


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
