"""`llmopt compile --validate`: is what was prepared for TensorRT-LLM complete, consistent and made of numbers.

Every fault is found before one is told. Numbers are compared with the source's by the tests, not here: what is checked
may have come from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from llmopt.compilers.hub_model import check_split
from llmopt.compilers.inspection import (
    Checksums,
    Faults,
    Report,
    Seen,
    check_counts,
    compare,
    conclude,
    look_at_all,
    read_json,
    read_tensors,
    stray_weights,
    told,
)
from llmopt.compilers.model_check import check_model, check_tokenizer
from llmopt.compilers.trt_llm.config import EngineConfig
from llmopt.compilers.trt_llm.layout import layout
from llmopt.errors import CorruptError, LlmoptError
from llmopt.models.checkpoint import TensorInfo

CHECKPOINT, MODEL = "checkpoint", "model"  # where each mode has its weights in an artifact
_ABOUT = "engine.json"
_ENGINE, _BUNDLE = "checkpoint of TensorRT-LLM", "bundle for TensorRT-LLM"


def validate(folder: Path, *, record: bool = False) -> Report:
    """Check a prepared artifact, or the folder of weights in it; `record` writes CHECKSUMS beside what is in order.

    Raises LlmoptError where it is none, CorruptError that lists the faults where it is not in order. What was prepared
    for vLLM has the form of a bundle, and is checked too.
    """
    if (folder / CHECKPOINT).is_dir():
        return _engine(folder / CHECKPOINT, artifact=folder, record=record)
    if (folder / MODEL).is_dir():
        for_vllm = (read_json(folder / _ABOUT, Faults()) or {}).get("target") == "vllm"
        what = "checkpoint for vLLM" if for_vllm else _BUNDLE
        report = check_model(folder / MODEL, what, tensorrt=not for_vllm, record=record)
        _check_bundle_split(folder, what)
        return report
    if (folder / _ABOUT).exists():
        _refuse_artifact(folder)
    is_engine = any(folder.glob("rank*.safetensors"))
    if is_engine or (folder / "config.json").exists():
        config = read_json(folder / "config.json", Faults()) or {}
        is_engine = is_engine or "mapping" in config
        if is_engine:
            return _engine(folder, artifact=None, record=record)
        return check_model(folder, _BUNDLE, tensorrt=True, record=record)
    raise LlmoptError(
        f"`{folder}` is nothing that was prepared for TensorRT-LLM",
        hint=f"give an artifact with `{CHECKPOINT}/` or `{MODEL}/`, or one of these folders itself",
    )


def _refuse_artifact(artifact: Path) -> NoReturn:
    """An artifact without weights: LlmoptError for an engine that was built, CorruptError for what has lost them."""
    said = read_json(artifact / _ABOUT, Faults()) or {}
    if said.get("status") == "compiled":
        raise LlmoptError(
            f"`{artifact}` is built: the weights are in its engines, which TensorRT-LLM alone reads",
            hint="validate what it was built from; `llmopt store verify` reads an artifact's files again",
        )
    missing = MODEL if said.get("mode") == "bundle" else CHECKPOINT
    raise CorruptError(f"`{artifact}` has no `{missing}/`", hint="copy the whole artifact, or prepare it again")


def _check_bundle_split(artifact: Path, what: str) -> None:
    """CorruptError where the model cannot be split as engine.json says that the server will."""
    from llmopt.formats.reading import open_model

    faults = Faults()
    said = read_json(artifact / _ABOUT, faults) if (artifact / _ABOUT).exists() else {}
    with told(faults, _ABOUT):
        parallel = [(said or {}).get(f"{kind}_parallel", 1) for kind in ("tensor", "pipeline")]
        check_split(open_model(artifact / MODEL), parallel[0], parallel[1])
    faults.check(artifact, what)


def _engine(folder: Path, *, artifact: Path | None, record: bool) -> Report:
    """The unified checkpoint: config.json and a file a rank; in an artifact also the tokenizer and engine.json."""
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
        _check_repeated_heads(config, tensors, seen, faults)
        for file, found in tensors.items():
            _check_kv_scales(file, found, seen[file], faults)
    if artifact is not None:
        check_tokenizer(artifact, None if config is None else config.vocab_size, faults)
        _check_about(artifact, config, faults)
    return conclude(folder, _ENGINE, tensors, seen, sums, faults, ranks=len(files), record=record)


def _config(folder: Path, faults: Faults) -> EngineConfig | None:
    said, config = read_json(folder / "config.json", faults), None
    if said is not None and check_counts("config.json", said, faults):
        with told(faults, "config.json"):
            if check_counts("config.json", said.get("mapping", {}), faults):
                config = EngineConfig.parse(said)
    return config


def _check_about(artifact: Path, config: EngineConfig | None, faults: Faults) -> None:
    """engine.json, which the build and the server go by, against the checkpoint's own config.json."""
    if config is None or not (artifact / _ABOUT).exists():
        return
    said, own = read_json(artifact / _ABOUT, faults) or {}, config.to_json()
    for key, value in {
        "tensor_parallel": config.tensor_parallel,
        "pipeline_parallel": config.pipeline_parallel,
        "dtype": config.dtype,
        "quant_algo": config.algorithm,
        "kv_cache": own["quantization"]["kv_cache_quant_algo"],
        "vocab_size": config.vocab_size,
    }.items():
        if key in said and said[key] != value:
            faults.add(_ABOUT, f"says `{key}: {said[key]}` where config.json of the checkpoint says `{value}`")


def _check_repeated_heads(
    config: EngineConfig,
    tensors: Mapping[str, Mapping[str, TensorInfo]],
    seen: Mapping[str, Mapping[str, Seen]],
    faults: Faults,
) -> None:
    """Where there are more ranks than KV heads, those that share a head have the same rows of k and v: the last."""
    repeats = config.tensor_parallel // config.kv_heads
    if repeats < 2:
        return
    keys = 2 * config.kv_heads_of_rank * config.head_size
    share = keys / (keys + config.heads // config.tensor_parallel * config.head_size)
    whole = layout(replace(config, tensor_parallel=1), 0)
    for rank in range(config.ranks):
        first, here = f"rank{rank - rank % repeats}.safetensors", f"rank{rank}.safetensors"
        for name, info in tensors[here].items():
            is_split = ".attention.qkv." in name and name in whole and info.shape != whole[name].shapes[0]
            if first != here and is_split and name in seen[here] and name in seen.get(first, {}):
                size = round(info.size * share)
                if _tail(info, size) != _tail(tensors[first][name], size):
                    faults.add(here, f"`{name}` has other rows of the KV head that it shares with {first}")


def _tail(info: TensorInfo, size: int) -> bytes:
    with info.file.open("rb") as stream:
        stream.seek(info.offset + info.size - size)
        return stream.read(size)


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
