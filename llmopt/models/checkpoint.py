"""Read a Hugging Face checkpoint without loading it: headers at once, tensors one at a time.

Only config.json and the safetensors headers are read on opening, so a damaged checkpoint is found before any work.
Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import os
import shlex
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 100_000_000
#: How each safetensors dtype is seen by numpy; BF16 and FP8, which numpy lacks, come as their bits.
STORAGE: Mapping[str, type[np.generic]] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F8_E4M3": np.uint8,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
#: Ends of the names of weights that are pickles.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `offset` counts bytes from the start of `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors weights (one file, or shards with an index)."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read config.json and every header; raises LlmoptError when something is missing, truncated or malformed."""
        if not path.is_dir():
            raise LlmoptError(f"no model folder at `{path}`", hint="give the folder that holds config.json")
        config = _read_json(path / "config.json", hint="a checkpoint is a folder with config.json and *.safetensors")
        _add_quantization(path, config)
        tensors: dict[str, TensorInfo] = {}
        for file, expected in _shards(path).items():
            found = read_header(file)
            for name in expected:
                if name not in found:
                    raise LlmoptError(
                        f"`{file.name}` lacks the tensor `{name}` that the index promises",
                        hint="download the checkpoint again: index and shards do not belong together",
                    )
            tensors.update(found if not expected else {name: found[name] for name in expected})
        return cls(path, config, tensors)

    def array(self, name: str) -> np.ndarray:
        """The tensor as a read-only memory map; BF16 and FP8 come as their bits (uint16, uint8)."""
        info = self._info(name)
        flat = self._maps(info.file)[info.offset : info.offset + info.size]
        return flat.view(STORAGE[info.dtype]).reshape(info.shape)

    def float_array(self, name: str) -> np.ndarray:
        """A float32 copy of a floating-point tensor."""
        info = self._info(name)
        array = self.array(name)
        return bfloat16_to_float32(array) if info.dtype == "BF16" else np.array(array, np.float32)

    def tensor(self, name: str) -> torch.Tensor:
        """A torch copy of the tensor in its own dtype."""
        import torch

        info = self._info(name)
        copy = torch.from_numpy(np.array(self.array(name)))
        bits = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}.get(info.dtype)
        return copy if bits is None else copy.view(bits)

    def source(self, name: str) -> TensorInfo | torch.Tensor:
        """What to write where the tensor is passed on: where it lies, or the tensor where that is not what it holds."""
        return self._info(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Let the system read these tensors ahead, while this process is at other work."""
        for name in names:
            if (info := self.tensors.get(name)) is not None:
                with info.file.open("rb", buffering=0) as stream:
                    os.posix_fadvise(stream.fileno(), info.offset, info.size, os.POSIX_FADV_WILLNEED)

    def release(self) -> None:
        """Let go of the memory maps, so that pages already read stop counting against this process."""
        self._open_maps.clear()

    @cached_property
    def _open_maps(self) -> dict[Path, np.ndarray]:
        return {}

    def _maps(self, file: Path) -> np.ndarray:
        if file not in self._open_maps:
            # A plain ndarray view: memmap's own indexing is slow and its type leaks into results.
            self._open_maps[file] = np.memmap(file, np.uint8, "r").view(np.ndarray)
        return self._open_maps[file]

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise LlmoptError(
                f"the checkpoint `{self.path}` has no tensor `{name}`",
                hint="is a shard missing, or does config.json belong to another model?",
            )
        return self.tensors[name]


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """BF16 bits (uint16) as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Finite float32 values as BF16 bits (uint16), rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, checked against the file's size; nothing but the header is read."""
    hint = f"download `{file.name}` again"
    if not file.is_file():
        raise LlmoptError(f"the shard `{file}` is missing", hint=hint)
    total = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else total
        if not 2 <= length <= min(total - 8, _MAX_HEADER_BYTES):
            raise LlmoptError(f"`{file}` is truncated or not a safetensors file", hint=hint)
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise LlmoptError(f"`{file}` has a damaged header", hint=hint) from None
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(name, entry, file, 8 + length) for name, entry in header.items()}
    end = max((t.offset + t.size for t in tensors.values()), default=8 + length)
    if end > total:
        raise LlmoptError(f"`{file}` is truncated: {total} bytes where its header needs {end}", hint=hint)
    return tensors


def _tensor_info(name: str, entry: Mapping[str, Any], file: Path, base: int) -> TensorInfo:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if dtype not in STORAGE:
        raise LlmoptError(f"`{name}` in `{file}` has the dtype `{dtype}`, which is not supported")
    if end - begin != int(np.prod(shape, dtype=np.int64)) * np.dtype(STORAGE[dtype]).itemsize:
        raise LlmoptError(f"`{name}` in `{file}` has a header whose shape and size disagree")
    return TensorInfo(dtype, shape, file, base + begin, end - begin)


def _shards(path: Path) -> dict[Path, list[str]]:
    """Each weight file with the names it must hold (none named: whatever it holds)."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return {single: []}
    if not index.is_file():
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        if pickled:
            raise _pickled(path, f"`{path}` has its weights only as `{pickled[0]}`")
        raise LlmoptError(
            f"no `model.safetensors` and no `model.safetensors.index.json` in `{path}`",
            hint="is the download complete?",
        )
    weight_map = _read_json(index, hint="download it again").get("weight_map")
    if not isinstance(weight_map, dict):
        raise LlmoptError(f"`{index}` has no `weight_map`", hint="download it again")
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise LlmoptError(f"`{index}` names the file `{file}` outside its folder")
        if Path(file).suffix in PICKLES:
            raise _pickled(path, f"`{index}` names `{file}`")
        shards.setdefault(path / file, []).append(name)
    return shards


def _pickled(path: Path, message: str) -> LlmoptError:
    return LlmoptError(
        f"{message}, a pickle: it can hold code, and llmopt loads none",
        hint=unpickling(str(path), f"{path}-safetensors"),
    )


def unpickling(source: str, made: str) -> str:
    """The command that makes safetensors of pickled weights; transformers takes nothing but tensors from them."""
    script = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; a, b = sys.argv[1:]; "
        "M.from_pretrained(a, dtype='auto').save_pretrained(b); T.from_pretrained(a).save_pretrained(b)"
    )
    return f'convert them once: `python -c "{script}" {shlex.quote(source)} {shlex.quote(made)}`'


def _add_quantization(path: Path, config: dict[str, Any]) -> None:
    """Into `quantization_config`: what ModelOpt (and AutoGPTQ, once) say in a file beside config.json."""
    own = config.get("quantization_config")
    beside, gptq = path / "hf_quant_config.json", path / "quantize_config.json"
    if beside.is_file() and (own is None or own.get("quant_method") == "modelopt"):
        said = _read_json(beside, hint="download it again")
        config["quantization_config"] = {"quant_method": "modelopt", **(own or {}), **said}
    elif own is None and gptq.is_file():
        config["quantization_config"] = {"quant_method": "gptq", **_read_json(gptq, hint="download it again")}


def _read_json(file: Path, *, hint: str) -> dict[str, Any]:
    if not file.is_file():
        raise LlmoptError(f"no `{file.name}` in `{file.parent}`", hint=hint)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LlmoptError(f"`{file}` is not JSON: {error}", hint=hint) from None
    if not isinstance(value, dict):
        raise LlmoptError(f"`{file}` is not a JSON object", hint=hint)
    return value
