"""`llmopt compile --validate`: is what was prepared for TensorRT-LLM complete, consistent and made of numbers.

Every fault is found before one is told. Numbers are compared with the source's by the tests, not here: what is checked
may have come from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmopt.compilers.inspection import (
    Checksums,
    Faults,
    Report,
    Seen,
    compare,
    conclude,
    look_at_all,
    read_json,
    read_tensors,
    stray_weights,
)
from llmopt.compilers.model_check import check_model, check_tokenizer
from llmopt.compilers.trt_llm.config import EngineConfig
from llmopt.compilers.trt_llm.layout import layout
from llmopt.errors import LlmoptError
from llmopt.models.checkpoint import TensorInfo

CHECKPOINT, MODEL = "checkpoint", "model"  # where each mode has its weights in an artifact
_ENGINE, _BUNDLE = "checkpoint of TensorRT-LLM", "bundle for TensorRT-LLM"


def validate(folder: Path, *, record: bool = False) -> Report:
    """Check a prepared artifact, or the folder of weights in it; `record` writes CHECKSUMS beside what is in order.

    Raises LlmoptError where it is none, CorruptError that lists the faults where it is not in order.
    """
    if (folder / CHECKPOINT / "config.json").exists():
        return _engine(folder / CHECKPOINT, tokenizer=folder, record=record)
    if (folder / MODEL / "config.json").exists():
        return check_model(folder / MODEL, _BUNDLE, tensorrt=True, record=record)
    is_engine = any(folder.glob("rank*.safetensors"))
    if is_engine or (folder / "config.json").exists():
        config = read_json(folder / "config.json", Faults()) or {}
        is_engine = is_engine or "mapping" in config
        if is_engine:
            return _engine(folder, tokenizer=None, record=record)
        return check_model(folder, _BUNDLE, tensorrt=True, record=record)
    raise LlmoptError(
        f"`{folder}` is nothing that was prepared for TensorRT-LLM",
        hint=f"give an artifact with `{CHECKPOINT}/` or `{MODEL}/`, or one of these folders itself",
    )


def _engine(folder: Path, *, tokenizer: Path | None, record: bool) -> Report:
    """The unified checkpoint: config.json and a file a rank."""
    faults = Faults()
    sums, config = Checksums.read(folder, faults), _config(folder, faults)
    numbers = range(config.ranks) if config is not None else range(len(list(folder.glob("rank*.safetensors"))))
    files = [f"rank{rank}.safetensors" for rank in numbers]
    stray_weights(folder, files, faults)
    tensors = {file: read_tensors(folder / file, faults) for file in files}
    unfit: dict[str, set[str]] = {}
    for rank, file in zip(numbers, files, strict=True):
        if config is not None and tensors[file]:
            unfit[file] = compare(file, tensors[file], layout(config, rank), faults)
    seen = look_at_all(tensors, unfit, faults)
    if config is not None:
        _check_ranks(config, seen, faults)
        for file, found in tensors.items():
            _check_kv_scales(file, found, seen[file], faults)
    if tokenizer is not None:
        check_tokenizer(tokenizer, None if config is None else config.vocab_size, faults)
    return conclude(folder, _ENGINE, tensors, seen, sums, faults, ranks=len(files), record=record)


def _config(folder: Path, faults: Faults) -> EngineConfig | None:
    said = read_json(folder / "config.json", faults)
    if said is None:
        return None
    try:
        return EngineConfig.parse(said)
    except LlmoptError as error:
        faults.add("config.json", error.message.removeprefix("config.json "))
        return None


def _check_kv_scales(where: str, tensors: Mapping[str, TensorInfo], seen: Mapping[str, Seen], faults: Faults) -> None:
    """`kv_cache_scaling_factor`, the one that engines use, is the larger of those of keys and values."""
    for name in tensors:
        prefix, _, suffix = name.rpartition(".")
        names = [f"{prefix}.{each}_cache_scaling_factor" for each in ("kv", "k", "v")]
        if suffix == "kv_cache_scaling_factor" and all(each in seen for each in names):
            both, keys, values = (_scalar(tensors[each]) for each in names)
            if both != max(keys, values):
                faults.add(where, f"`{name}` is not the larger of those of keys and values")


def _scalar(info: TensorInfo) -> float:
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        return float(np.frombuffer(stream.read(info.size), np.float32)[0])


def _check_ranks(config: EngineConfig, seen: Mapping[str, Mapping[str, Seen]], faults: Faults) -> None:
    """What is not split must be the same on all ranks of a stage; of what is split no two may have the same part."""
    whole = replace(config, tensor_parallel=1)
    for stage in range(config.pipeline_parallel if config.tensor_parallel > 1 else 0):
        ranks = [stage * config.tensor_parallel + each for each in range(config.tensor_parallel)]
        unsplit = layout(whole, stage)
        for name, part in layout(config, ranks[0]).items():
            found = {rank: each for rank in ranks if (each := seen.get(f"rank{rank}.safetensors", {}).get(name))}
            if len(found) < 2:
                continue
            first, *others = found.items()
            for rank, each in others:
                if part == unsplit[name] and each.digest != first[1].digest:
                    faults.add(f"rank{rank}.safetensors", f"`{name}` is not what it is on rank {first[0]}")
            if part != unsplit[name] and name.endswith(".weight"):
                _check_distinct(name, found, faults)


def _check_distinct(name: str, found: Mapping[int, Seen], faults: Faults) -> None:
    owners: dict[str, int] = {}
    for rank, each in found.items():
        owner = owners.setdefault(each.digest, rank)
        if owner != rank and not each.constant:
            faults.add(f"rank{rank}.safetensors", f"`{name}` is the part of rank {owner}")
