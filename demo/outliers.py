"""Give a model the activation outliers of a large one, without changing what it computes.

Large language models carry a few channels whose activations are tens of times the others', the same channels in every
block (Dettmers et al., arXiv:2208.07339, section 3); int8 activations fail on them (Xiao et al., arXiv:2211.10438). A
small model has none, so here they are made: in each norm's weight some channels are multiplied by a factor, and the
columns that read those channels, in the linears behind the norm, are divided by it.

The default factor is a power of two: then both roundings to bf16 are exact and the logits stay the same to the bit of
the weights. With any other factor the columns are divided by what the rounded norm weight really became.

    python demo/outliers.py demo/model /tmp/with-outliers
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from llmopt.errors import LlmoptError

#: A norm, and the linears of its block that read its output and nothing else does.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
NORM = re.compile(rf"(.*\.layers\.\d+\.)({'|'.join(READERS)})\.weight")


class Weights:
    """One safetensors file in memory; tensors are changed in place, everything else keeps its bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        header_bytes = int.from_bytes(self.data[:8], "little")
        self.start = 8 + header_bytes
        self.header = json.loads(self.data[8 : self.start])

    def raw(self, name: str) -> np.ndarray:
        """The stored numbers, writable; bf16 as its 16 bits."""
        entry = self.header[name]
        dtypes = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
        if entry["dtype"] not in dtypes:
            raise LlmoptError(f"`{name}` in `{self.path}` is {entry['dtype']}", hint="give a model in BF16, F16 or F32")
        begin, end = (self.start + offset for offset in entry["data_offsets"])
        return np.frombuffer(memoryview(self.data)[begin:end], dtypes[entry["dtype"]]).reshape(entry["shape"])

    def get(self, name: str) -> np.ndarray:
        """The numbers as float32, a copy."""
        raw = self.raw(name)
        if raw.dtype == np.uint16:
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)

    def put(self, name: str, value: np.ndarray) -> None:
        """Store float32 numbers, rounded to the nearest of the file's type, ties to even."""
        raw = self.raw(name)
        if raw.dtype == np.uint16:
            bits = value.view(np.uint32)
            raw[...] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        else:
            raw[...] = value


def choose_channels(width: int, channels: int, seed: int) -> list[int]:
    """The channels with the smallest hashes: the same on every platform and for every norm of the model."""
    ranked = sorted(range(width), key=lambda c: hashlib.sha256(f"{seed}/{c}".encode()).digest())
    return sorted(ranked[:channels])


def scale_norm(files: dict[str, Weights], norm: str, readers: list[str], picked: list[int], factor: float) -> None:
    """Multiply channels of one norm and divide the columns of its readers, in place."""
    missing = [name for name in (norm, *readers) if name not in files]
    if missing:
        raise LlmoptError(f"the model has no tensor `{missing[0]}`", hint="its blocks must be those of a Llama")
    before_I = files[norm].get(norm)
    after_I = before_I.copy()
    after_I[picked] *= np.float32(factor)
    files[norm].put(norm, after_I)
    after_I = files[norm].get(norm)
    for name in readers:
        weight_OI = files[name].get(name)
        for channel in picked:
            if before_I[channel] != 0:
                weight_OI[:, channel] *= before_I[channel] / after_I[channel]
        files[name].put(name, weight_OI)


def add_outliers(src: Path, dst: Path, *, channels: int = 8, factor: float = 32.0, seed: int = 0) -> list[int]:
    """Write to `dst` the model of folder `src` with outlier channels; returns the channels.

    `dst` must not exist, and appears whole. The bytes depend on the arguments and the source alone.
    """
    paths = sorted(src.glob("*.safetensors"))
    if not paths:
        raise LlmoptError(f"there is no *.safetensors in `{src}`", hint="give the folder of a Hugging Face checkpoint")
    if dst.exists():
        raise LlmoptError(f"`{dst}` exists already", hint="name a folder that does not exist")
    files = {name: weights for weights in map(Weights, paths) for name in weights.header if name != "__metadata__"}
    norms = [match for name in sorted(files) if (match := NORM.fullmatch(name))]
    if not norms:
        raise LlmoptError(f"no norm of a decoder block in `{src}`", hint="its blocks must be those of a Llama")
    width = files[norms[0][0]].get(norms[0][0]).size
    if not 1 <= channels <= width:
        raise LlmoptError(f"cannot choose {channels} channels of {width}", hint=f"give 1 to {width}")
    picked = choose_channels(width, channels, seed)
    for match in norms:
        block, norm = match.groups()
        scale_norm(files, match[0], [f"{block}{reader}.weight" for reader in READERS[norm]], picked, factor)

    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}.") as aside:
        folder = Path(aside) / "model"
        shutil.copytree(src, folder, ignore=shutil.ignore_patterns("*.safetensors", "TRAINING.json"))
        for weights in {id(w): w for w in files.values()}.values():
            (folder / weights.path.name).write_bytes(weights.data)
        folder.rename(dst)
    return picked


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a copy of a model that has activation outliers.")
    parser.add_argument("src", type=Path, help="folder of the model")
    parser.add_argument("dst", type=Path, help="folder to write; must not exist")
    parser.add_argument("--channels", type=int, default=8, help="how many (default %(default)s)")
    parser.add_argument("--factor", type=float, default=32.0, help="times the others; a power of two is exact in bf16")
    parser.add_argument("--seed", type=int, default=0, help="chooses the channels")
    a = parser.parse_args()
    try:
        picked = add_outliers(a.src, a.dst, channels=a.channels, factor=a.factor, seed=a.seed)
    except LlmoptError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        return int(error.code)
    print(f"channels {', '.join(map(str, picked))} times {a.factor:g} in {a.dst}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
