"""A LoRA adapter, as PEFT saves it, merged into a checkpoint while it is read: W + scale * B @ A, tensor by tensor.

Sources: Hu et al., arXiv:2106.09685; scale alpha / sqrt(r): Kalajdzievski, arXiv:2312.03732 (rsLoRA); magnitude and
direction: Liu et al., arXiv:2402.09353 (DoRA). Shape suffixes: O out, I in features, R rank, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmopt.errors import LlmoptError
from llmopt.models.checkpoint import FLOATS, Checkpoint, TensorInfo, float32_to_bfloat16, read_header
from llmopt.models.companions import read_json
from llmopt.models.config import DecoderConfig

if TYPE_CHECKING:
    import torch

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<factor>[AB])\.(?P<kind>weight|bias)|lora_embedding_(?P<table>[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
#: How an adapter was begun or trained, which changes nothing in what its tensors mean.
_HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
})  # fmt: skip
_BEGUN_PLAINLY = ("true", "false", "none", "gaussian", "eva", "orthogonal")  # others change the base model first
_MERGE_FIRST = "merge it with peft (`merge_and_unload`), save the model, and give its folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """What becomes of one tensor of the checkpoint; the names are of tensors of the adapter.

    `whole` takes its place. `down` [R, I] and `up` [O, R] add scale * up @ down, or its transpose; `magnitude` [O] then
    is the norm that what belongs to each out feature gets. `added` [O], times scale, is added to a bias.
    """

    whole: str | None = None
    down: str | None = None
    up: str | None = None
    magnitude: str | None = None
    added: str | None = None
    scale: float = 1.0
    transposed: bool = False  # the tensor is [I, O]: Conv1D, and an embedding [V, H] (V in, H out)

    def names(self) -> set[str]:
        return {n for n in (self.whole, self.down, self.up, self.magnitude, self.added) if n is not None}


def open_checkpoint(model: Path, adapter: Path | None = None) -> Checkpoint:
    """The checkpoint, with the adapter merged into what is read of it; only headers are read here.

    Raises LlmoptError for an adapter that cannot be merged exactly, or that has a tensor with no place in the model.
    """
    base = Checkpoint.open(model)
    return base if adapter is None else AdaptedCheckpoint.merge(base, adapter)


def plain_parts(checkpoint: Checkpoint) -> tuple[Checkpoint, ...]:
    """What a checkpoint is read from: itself, or the base and the adapter."""
    return (checkpoint.base, checkpoint.adapter) if isinstance(checkpoint, AdaptedCheckpoint) else (checkpoint,)


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are merged with an adapter each time they are read. Names, shapes, dtypes: the base's.

    `float_array` gives the merged float32 values, `array` and `tensor` the same rounded to the base's dtype. The bits
    are those of a product by one BLAS thread, as inside of `parallel.Workers`.
    """

    base: Checkpoint
    adapter: Checkpoint
    changes: Mapping[str, _Change]

    @classmethod
    def merge(cls, base: Checkpoint, folder: Path) -> AdaptedCheckpoint:
        """Find the place of every tensor in the adapter's folder."""
        if "quantization_config" in base.config:
            raise LlmoptError(
                f"`{base.path}` is quantized: no adapter can be merged into it",
                hint="give the checkpoint that it was made from",
            )
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise LlmoptError(f"no `{name}` in the adapter `{folder}`", hint="give a folder that peft has saved")
        adapter = Checkpoint(folder, read_json(folder / CONFIG_FILE), read_header(folder / WEIGHTS_FILE))
        _check_config(adapter)
        changes = _Placement(base, adapter).changes()
        return cls(base.path, base.config, base.tensors, base, adapter, changes)

    def array(self, name: str) -> np.ndarray:
        if name not in self.changes:
            return self.base.array(name)
        values, dtype = self.float_array(name), self._info(name).dtype
        if dtype == "BF16":
            return float32_to_bfloat16(values)
        return values.astype({"F16": np.float16, "F64": np.float64}.get(dtype, np.float32))

    def float_array(self, name: str) -> np.ndarray:
        change = self.changes.get(name)
        if change is None:
            return self.base.float_array(name)
        values = self.base.float_array(name) if change.whole is None else self.adapter.float_array(change.whole)
        if change.added is not None:
            values += np.float32(change.scale) * self.adapter.float_array(change.added)
        if change.up is None or change.down is None:
            return values
        return self._low_rank(values, change, change.up, change.down).numpy()

    def source(self, name: str) -> TensorInfo | torch.Tensor:
        return self.tensor(name) if name in self.changes else self.base.source(name)

    def release(self) -> None:
        self.base.release()
        self.adapter.release()

    def _low_rank(self, values: np.ndarray, change: _Change, up: str, down: str) -> torch.Tensor:
        import torch

        weight = torch.from_numpy(values)
        up_OR, down_RI = (torch.from_numpy(self.adapter.float_array(name)).double() for name in (up, down))
        # In float64, as a driver may have switched products of float32 to BF16 factors.
        delta_OI = (up_OR @ down_RI).mul_(change.scale).float()
        weight += delta_OI.T if change.transposed else delta_OI
        if change.magnitude is not None:
            weight_OI = weight.T if change.transposed else weight  # a view: what is done to it is done to `weight`
            magnitude_O = torch.from_numpy(self.adapter.float_array(change.magnitude)).reshape(-1)
            weight_OI *= (magnitude_O / torch.linalg.vector_norm(weight_OI, dim=1))[:, None]
        return weight


def _check_config(adapter: Checkpoint) -> None:
    """Refuse what would not be merged as it was trained."""
    values = adapter.config
    kind = str(values.get("peft_type"))
    if kind != "LORA":
        raise LlmoptError(f"the adapter is of the type `{kind}`: only LoRA is merged", hint=_MERGE_FIRST)
    begun = str(values.get("init_lora_weights", True)).lower()
    if begun not in _BEGUN_PLAINLY:
        raise LlmoptError(
            f"the adapter was begun with `init_lora_weights: {begun}`, which changes the base model too",
            hint="convert it with peft's `save_pretrained(..., path_initial_model_for_weight_conversion=...)`",
        )
    for key, value in values.items():
        if value and key not in _HARMLESS:
            raise LlmoptError(f"the adapter has `{key}: {_short(value)}`, which is not merged here", hint=_MERGE_FIRST)


class _Placement:
    """Which tensor of the base each tensor of the adapter changes."""

    def __init__(self, base: Checkpoint, adapter: Checkpoint) -> None:
        self._base, self._adapter = base, adapter
        config = DecoderConfig.read(base)
        self._embedding, self._tied = f"{config.family.embedding}.weight", config.tie_embeddings

    def changes(self) -> dict[str, _Change]:
        whole: dict[str, str] = {}
        parts: dict[str, dict[str, str]] = {}
        for name in self._adapter.tensors:
            part = _PART.fullmatch(name)
            if part is None:
                whole[self._place(name, name.replace(".base_layer.", ".").replace(".modules_to_save.", "."))] = name
                continue
            factor = (
                "magnitude" if part["magnitude"] else f"{part['factor'] or part['table']}.{part['kind'] or 'table'}"
            )
            parts.setdefault(part["module"], {})[factor] = name
        changes = {target: _Change(whole=name) for target, name in whole.items()}
        for module, found in parts.items():
            for target, change in self._low_rank(module, found, whole):
                if target in changes and changes[target].down is not None:
                    raise LlmoptError(f"two parts of the adapter change `{target}`", hint=_MERGE_FIRST)
                changes[target] = change
        for target, change in changes.items():
            self._check(target, change)
        return changes

    def _low_rank(self, module: str, found: Mapping[str, str], whole: Mapping[str, str]) -> list[tuple[str, _Change]]:
        """The changes that the factors of one module make: to its weight, and to its bias if `lora_bias` is set."""
        first = next(iter(found.values()))
        table = "A.table" in found
        down, up = (
            (found.get("A.table"), found.get("B.table")) if table else (found.get("A.weight"), found.get("B.weight"))
        )
        if down is None or up is None:
            raise LlmoptError(f"the adapter has `{first}`, but not both factors of it", hint="save the adapter again")
        target = self._place(first, f"{module}.weight")
        scale = self._scale(module, down)
        transposed = table or bool(self._adapter.config.get("fan_in_fan_out"))
        changes = [
            (
                target,
                _Change(
                    whole=whole.get(target),
                    down=down,
                    up=up,
                    magnitude=found.get("magnitude"),
                    scale=scale,
                    transposed=transposed,
                ),
            )
        ]
        if "B.bias" in found:
            bias = self._place(found["B.bias"], f"{module}.bias")
            changes.append((bias, _Change(whole=whole.get(bias), added=found["B.bias"], scale=scale)))
        return changes

    def _scale(self, module: str, down: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, of the patterns that fit the module."""
        config, path = self._adapter.config, module.removeprefix(_PREFIX)
        rank, alpha = _number(config, "r", "rank_pattern", path), _number(config, "lora_alpha", "alpha_pattern", path)
        stored = self._adapter.tensors[down].shape[0]
        if rank != stored:
            raise LlmoptError(
                f"`{down}` has the rank {stored}, where `{CONFIG_FILE}` says {rank}", hint="do they belong together?"
            )
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    def _place(self, name: str, wanted: str) -> str:
        """The tensor of the base that is called `wanted`, be it with or without a prefix that wraps the model."""
        wanted, tensors = wanted.removeprefix(_PREFIX), self._base.tensors
        if wanted in tensors:
            return wanted
        near = [n for n in tensors if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
        if len(near) != 1:
            raise LlmoptError(
                f"the tensor `{name}` of the adapter has no place in the model",
                hint="is this the model that the adapter was trained on?",
            )
        return near[0]

    def _check(self, target: str, change: _Change) -> None:
        """Shapes and dtypes, and that nothing is tied to what changes."""
        info = self._base.tensors[target]
        if self._tied and target == self._embedding:
            raise LlmoptError(
                f"the adapter changes `{target}`, which the model ties to its output layer", hint=_MERGE_FIRST
            )
        shapes: dict[str, tuple[int, ...]] = {}
        if change.whole is not None:
            shapes[change.whole] = info.shape
        if change.added is not None:
            shapes[change.added] = info.shape
        if change.up is not None and change.down is not None:
            rank = self._adapter.tensors[change.down].shape[0]
            out, in_ = (info.shape[::-1] if change.transposed else info.shape) if len(info.shape) == 2 else (0, 0)
            shapes |= {change.up: (out, rank), change.down: (rank, in_)}
            if change.magnitude is not None:
                shapes[change.magnitude] = (out,)
        for name, shape in shapes.items():
            stored = self._adapter.tensors[name]
            same = stored.shape == shape or (name == change.magnitude and math.prod(stored.shape) == shape[0])
            if not same or stored.dtype not in FLOATS:
                raise LlmoptError(
                    f"`{name}` of the adapter is {list(stored.shape)} in {stored.dtype}, where `{target}` needs"
                    f" {list(shape)}",
                    hint="is this the model that the adapter was trained on, with the same vocabulary?",
                )


def _number(config: Mapping[str, Any], key: str, pattern_key: str, path: str) -> float:
    """The value for a module: that of the first pattern that fits the end of its path, else the common one."""
    patterns = config.get(pattern_key) or {}
    value = next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", path)), config.get(key, 8))
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise LlmoptError(f"`{CONFIG_FILE}` has no usable `{key}` for `{path}`: `{value}`")
    return value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
