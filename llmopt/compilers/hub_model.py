"""What runtimes that load a checkpoint as it is have in common: what is copied for them, and how they split it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts.outcome import Progress
from llmopt.errors import LlmoptError, SettingsError
from llmopt.models.companions import copy_companions

if TYPE_CHECKING:
    from llmopt.formats.reading import Source
    from llmopt.models.checkpoint import Checkpoint

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_tokenizer_files(model: Path) -> None:
    """LlmoptError where a model has no tokenizer."""
    if not any((model / file).is_file() for file in TOKENIZERS):
        raise LlmoptError(
            f"no tokenizer in `{model}`", hint="copy tokenizer.json and tokenizer_config.json beside the weights"
        )


def check_split(source: Source, tensor_parallel: int, pipeline_parallel: int) -> None:
    """SettingsError for sizes that the parallelism does not divide; TensorRT-LLM and vLLM agree there."""
    config, reader, ranks = source.config, source.reader, tensor_parallel
    for what, size in {"attention heads": config.heads, "intermediate features": config.intermediate_size}.items():
        if size % ranks:
            raise SettingsError(f"{size} {what} cannot be split over {ranks} GPUs", hint=f"`--tp` must divide {size}")
    if config.kv_heads % ranks and ranks % config.kv_heads:
        raise SettingsError(
            f"{config.kv_heads} KV heads can neither be split over {ranks} GPUs nor repeated on them",
            hint=f"`--tp` must divide {config.kv_heads} or be a multiple of it",
        )
    if pipeline_parallel > config.layers:
        raise SettingsError(
            f"{config.layers} blocks cannot be split over {pipeline_parallel} GPUs",
            hint="use a smaller `--pp`",
        )
    if reader is None:
        return
    for index in range(config.layers):
        shapes = config.linear_shapes(index)
        for site in config.sites(index):
            for name in site.linears:
                prefix, (rows, columns) = f"{config.block(index)}.{name}", shapes[name]
                scheme = reader.scheme(prefix)
                if scheme is None or scheme.group_size <= 0:
                    continue
                across = site.role in ("o", "down")  # whose in-features the ranks share out
                if across and columns // ranks % scheme.group_size:
                    raise _split_group(prefix, columns // ranks, "in-features", ranks, scheme.group_size)
                if scheme.kind == "float" and not across and rows // ranks % scheme.group_size:
                    raise _split_group(prefix, rows // ranks, "out-features", ranks, scheme.group_size)


def _split_group(prefix: str, features: int, what: str, ranks: int, group_size: int) -> SettingsError:
    return SettingsError(
        f"`{prefix}` has {features} {what} on each of {ranks} GPUs, which groups of {group_size} do not divide",
        hint="a smaller `--tp`, or quantize with a smaller `--group-size`",
    )


def copy_model(checkpoint: Checkpoint, out: Path, progress: Progress) -> None:
    """The checkpoint's own files and nothing else: runtimes load every *.safetensors that they find."""
    path = checkpoint.path
    weights = sorted({info.file for info in checkpoint.tensors.values()})
    for number, file in enumerate(weights, 1):
        shutil.copyfile(file, out / file.name)
        progress(f"copied {file.name}", done=number, total=len(weights))
    names = ["config.json", "hf_quant_config.json", "quantize_config.json"]
    if not (path / "model.safetensors").is_file():
        names.append("model.safetensors.index.json")
    for name in names:
        if (path / name).is_file():
            shutil.copyfile(path / name, out / name)
    copy_companions(path, out)
