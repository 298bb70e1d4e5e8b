"""Look at every tensor of a folder of safetensors files: headers, values, digests. Faults are gathered, not raised.

Runtimes take missing scales for ones and misnamed weights for zeros, so what is prepared for them is checked here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.artifacts.disk import byte_size
from llmopt.artifacts.outcome import Json
from llmopt.errors import CorruptError, LlmoptError
from llmopt.formats.base import Part
from llmopt.models.checkpoint import STORAGE, TensorInfo, read_header

#: Digests of every tensor and of the small files beside, written when a checkpoint is prepared. They tell what no rule
#: can: two tensors of one shape that changed places, between ranks or modules, and a number of config.json.
CHECKSUMS = "checksums.json"
_SCHEMA = "llmopt.checksums/1"
_SHOWN = 20
_CHUNK = 1 << 24
_MOST = 10_000  # layers, experts or ranks

#: The last part of the names of tensors that something is multiplied or divided by: a zero or less is a mistake.
SCALES = frozenset(
    {
        # TensorRT-LLM's
        "weights_scaling_factor", "activation_scaling_factor", "prequant_scaling_factor", "per_channel_scale",
        "smoother", "scale_to_int", "k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor",
        # of Hugging Face checkpoints
        "weight_scale", "weight_scale_inv", "input_scale", "pre_quant_scale", "k_scale", "v_scale", "scales",
    }
)  # fmt: skip


#: Of each float: an unsigned integer of its size, and the bits of its exponent, all set where it is no number.
_EXPONENTS: Mapping[str, tuple[type[np.unsignedinteger[Any]], Any]] = {
    "F64": (np.uint64, np.uint64(0x7FF << 52)),
    "F32": (np.uint32, np.uint32(0xFF << 23)),
    "F16": (np.uint16, np.uint16(0x1F << 10)),
    "BF16": (np.uint16, np.uint16(0xFF << 7)),
}


@dataclass(slots=True)
class Faults:
    """What is wrong, in order: where, what, and what was expected."""

    found: list[str] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}")

    def check(self, folder: Path, what: str) -> None:
        """Raise CorruptError with all of them (the first 20 in words), if there are any."""
        if not self.found:
            return
        count = len(self.found)
        lines = [f"  {fault}" for fault in self.found[:_SHOWN]]
        lines += [f"  and {count - _SHOWN} more"] if count > _SHOWN else []
        faults = "1 fault" if count == 1 else f"{count} faults"
        raise CorruptError(
            f"`{folder}` is no valid {what}: {faults}\n" + "\n".join(lines), hint="prepare it again from the source"
        )


#: What the readers of JSON files that no tool of theirs wrote end in, where they take a value for what it should be.
_UNFIT = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


@contextmanager
def told(faults: Faults, where: str) -> Iterator[None]:
    """What cannot be read of the file `where` becomes a fault; whatever comes after it in the block is left out."""
    try:
        yield
    except LlmoptError as error:
        faults.add(where, error.message.removeprefix(f"{where} "))
    except _UNFIT as error:
        faults.add(where, f"has a value that does not belong there ({error})")


def check_counts(where: str, said: Mapping[str, Any], faults: Faults) -> bool:
    """Whether numbers that decide how many tensors there are can be true; a fault for those that cannot."""
    counts = ("num_hidden_layers", "num_local_experts", "num_experts", "tp_size", "pp_size")
    large = [key for key in counts if isinstance(value := said.get(key), int) and value > _MOST]
    for key in large:
        faults.add(where, f"says `{key}: {said[key]}`, which cannot be")
    return not large


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was found in order. digests: how many of CHECKSUMS agree; 0 where the folder has none."""

    what: str
    ranks: int
    tensors: int
    bytes: int
    digests: int

    def to_json(self) -> dict[str, Json]:
        return {
            "valid": True,
            "what": self.what,
            "ranks": self.ranks,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "digests": self.digests,
        }

    def lines(self) -> list[str]:
        """For people."""
        size = f"{self.tensors} tensors of {self.ranks} ranks" if self.ranks > 1 else f"{self.tensors} tensors"
        sums = f"{self.digests} digests of {CHECKSUMS} agree"
        without = f"no {CHECKSUMS}: tensors of one shape that changed places would not be found"
        return [
            f"valid     a {self.what}",
            f"tensors   {size}, {byte_size(self.bytes)}: names, shapes, dtypes, values",
            f"digests   {sums if self.digests else without}",
        ]


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor's bytes: their digest, and whether all elements are equal."""

    digest: str
    constant: bool


def read_json(file: Path, faults: Faults) -> dict[str, Any] | None:
    """The object in a JSON file, None with a fault where there is none."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        faults.add(file.name, "is missing")
    except (ValueError, RecursionError) as error:
        faults.add(file.name, f"is not JSON ({error})")
    else:
        if isinstance(value, dict):
            return value
        faults.add(file.name, "holds no JSON object")
    return None


def read_tensors(file: Path, faults: Faults) -> dict[str, TensorInfo]:
    """The tensors of a file; a fault where it is missing or truncated, or where they overlap or leave gaps."""
    try:
        found = read_header(file)
    except LlmoptError as error:
        faults.add(file.name, error.message.replace(f"`{file}` ", "").replace(f" in `{file}`", ""))
        return {}
    except (KeyError, TypeError, ValueError, AttributeError):
        faults.add(file.name, "has a damaged header")
        return {}
    end = None
    for name, info in sorted(found.items(), key=lambda item: (item[1].offset, item[1].size)):
        if end is not None and info.offset != end:
            faults.add(file.name, f"the bytes of `{name}` do not follow those of the tensor before it")
        end = info.offset + info.size
    if end is not None and end != file.stat().st_size:
        faults.add(file.name, f"has {file.stat().st_size - end} bytes that belong to no tensor")
    return found


def compare(where: str, found: Mapping[str, TensorInfo], expected: Mapping[str, Part], faults: Faults) -> set[str]:
    """Names, dtypes and shapes against a layout that has every tensor; returns those of `found` that do not fit."""
    missing, extra = [name for name in expected if name not in found], [name for name in found if name not in expected]
    for name in missing:
        part = expected[name]
        like = [other for other in extra if _fits(found[other], part)]
        instead = f" (is `{like[0]}` this one?)" if len(like) == 1 else ""
        faults.add(where, f"`{name}` is missing: {_said(part)}{instead}")
    for name in extra:
        faults.add(where, f"`{name}`, {found[name].dtype} {list(found[name].shape)}, does not belong here")
    unfit = [name for name, part in expected.items() if name in found and not _fits(found[name], part)]
    for name in unfit:
        info, part = found[name], expected[name]
        turned = " (transposed?)" if info.shape not in part.shapes and info.shape[::-1] in part.shapes else ""
        faults.add(where, f"`{name}` is {info.dtype} {list(info.shape)} where {_said(part)} belongs{turned}")
    return {*extra, *unfit}


def look(where: str, name: str, info: TensorInfo, faults: Faults) -> Seen:
    """Read a tensor once, a piece at a time: values that are no numbers, and scales of zero or less, are faults."""
    digest, positive = sha256(), name.rpartition(".")[2] in SCALES
    width = np.dtype(STORAGE[info.dtype]).itemsize
    wrong: Counter[str] = Counter()
    first, constant = b"", True
    with info.file.open("rb", buffering=0) as stream:
        stream.seek(info.offset)
        left = info.size
        while left:
            data = stream.read(min(left, _CHUNK))
            if not data or len(data) % width:
                faults.add(where, f"`{name}` ends before its last byte")
                break
            left -= len(data)
            digest.update(data)
            first = first or data[:width]
            constant = constant and data == first * (len(data) // width)
            wrong.update(_wrong(np.frombuffer(data, STORAGE[info.dtype]), info.dtype, positive=positive))
    for what, count in wrong.items():
        if count:
            faults.add(where, f"`{name}` has {count} of {int(np.prod(info.shape))} values that are {what}")
    return Seen(digest.hexdigest(), constant)


def look_at_all(
    tensors: Mapping[str, Mapping[str, TensorInfo]], unfit: Mapping[str, set[str]], faults: Faults
) -> dict[str, dict[str, Seen]]:
    """All tensors but the unfit, of which one fault is enough; all by file."""
    return {
        file: {name: look(file, name, info, faults) for name, info in found.items() if name not in unfit.get(file, ())}
        for file, found in tensors.items()
    }


def _wrong(bits: np.ndarray, dtype: str, *, positive: bool) -> dict[str, int]:
    """Counts of values that cannot be meant, from their bits."""
    if dtype == "F8_E4M3":
        return {"NaN": int(np.count_nonzero((bits & np.uint8(0x7F)) == np.uint8(0x7F)))}
    if dtype not in _EXPONENTS:
        return {}
    unsigned, exponent = _EXPONENTS[dtype]
    bits = bits.view(unsigned)
    unusable = (bits & exponent) == exponent  # infinite or NaN
    counts = {"not finite": int(np.count_nonzero(unusable))}
    if positive:
        sign = unsigned(1) << unsigned(bits.itemsize * 8 - 1)
        counts["zero or less"] = int(np.count_nonzero(~unusable & ((bits >= sign) | (bits == 0))))
    return counts


def write_checksums(folder: Path, seen: Mapping[str, Mapping[str, Seen]]) -> int:
    """Write CHECKSUMS into a folder that has just been prepared; returns how many digests it has."""
    files = {file.name: sha256(file.read_bytes()).hexdigest() for file in _small_files(folder)}
    tensors = {
        file: {name: each.digest for name, each in sorted(found.items())} for file, found in sorted(seen.items())
    }
    text = json.dumps({"schema": _SCHEMA, "files": files, "tensors": tensors}, indent=1) + "\n"
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")
    return len(files) + sum(len(known) for known in tensors.values())


@dataclass(frozen=True, slots=True)
class Checksums:
    """What CHECKSUMS says: sha256 by file, and by tensor of each file of weights."""

    files: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, folder: Path, faults: Faults) -> Checksums | None:
        """None where there are none; the files beside are compared at once."""
        if not (folder / CHECKSUMS).exists():
            return None
        said = read_json(folder / CHECKSUMS, faults)
        if said is None or said.get("schema") != _SCHEMA:
            faults.add(CHECKSUMS, f"is not of the schema `{_SCHEMA}`")
            return None
        found = cls(said.get("files", {}), said.get("tensors", {}))
        found._compare_files(folder, faults)
        return found

    def _compare_files(self, folder: Path, faults: Faults) -> None:
        present = {file.name for file in _small_files(folder)}
        for name in sorted(self.files.keys() | present):
            if name not in present:
                faults.add(name, "is missing: it was there when the checkpoint was prepared")
            elif name not in self.files:
                faults.add(name, "was not there when the checkpoint was prepared")
            elif sha256((folder / name).read_bytes()).hexdigest() != self.files[name]:
                faults.add(name, "has changed since the checkpoint was prepared")

    def compare(self, seen: Mapping[str, Mapping[str, Seen]], faults: Faults) -> int:
        """The tensors `seen`, by file; returns how many digests there are, those of files too."""
        owners = {
            digest: f"`{name}` of {file}" for file, known in self.tensors.items() for name, digest in known.items()
        }
        for file, found in seen.items():
            known = self.tensors.get(file, {})
            for name, each in found.items():
                if name not in known:
                    faults.add(CHECKSUMS, f"has no digest of `{name}` of {file}")
                elif known[name] != each.digest:
                    owner = owners.get(each.digest)
                    instead = "other bytes than when it was prepared" if owner is None else f"the bytes of {owner}"
                    faults.add(file, f"`{name}` has {instead}")
        return len(self.files) + sum(len(known) for known in self.tensors.values())


def conclude(
    folder: Path,
    what: str,
    tensors: Mapping[str, Mapping[str, TensorInfo]],
    seen: Mapping[str, Mapping[str, Seen]],
    sums: Checksums | None,
    faults: Faults,
    *,
    ranks: int = 1,
    record: bool = False,
) -> Report:
    """Compare the digests, and raise CorruptError unless there are no faults; `record` writes CHECKSUMS then."""
    digests = 0 if sums is None else sums.compare(seen, faults)
    faults.check(folder, what)
    digests = write_checksums(folder, seen) if record else digests
    infos = [info for found in tensors.values() for info in found.values()]
    size = sum(info.size for info in infos)
    return Report(what=what, ranks=ranks, tensors=len(infos), bytes=size, digests=digests)


def stray_weights(folder: Path, known: Iterable[str], faults: Faults) -> None:
    """Weight files beside those that belong: TensorRT-LLM and vLLM load every *.safetensors that they find."""
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in set(known):
            faults.add(file.name, "does not belong here, and would be loaded")


def _small_files(folder: Path) -> list[Path]:
    """What lies beside the weights."""
    files = (file for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS)
    return sorted(file for file in files if file.suffix != ".safetensors")


def _fits(info: TensorInfo, part: Part) -> bool:
    return info.dtype in part.dtypes and info.shape in part.shapes


def _said(part: Part) -> str:
    return f"{' or '.join(part.dtypes)} {' or '.join(str(list(shape)) for shape in part.shapes)}"
