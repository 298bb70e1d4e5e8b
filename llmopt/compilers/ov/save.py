"""Save an OpenVINO model so that the same model gives the same bytes, and convert a tokenizer to one."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from llmopt.backends import load
from llmopt.compilers.ov.constants import DECOMPRESSED, Node
from llmopt.errors import LlmoptError
from llmopt.models.companions import read_json

ov, ov_tokenizers = load("openvino"), load("openvino_tokenizers")

_COUNTED = re.compile(r"([A-Z]\w*)_(\d+)((?:\.\d+)?)")
_ROOM = "is there room on the disk?"


def save(model: Node, file: Path) -> None:
    """Write `file` (.xml) and its .bin; raises LlmoptError when not all of it could be written."""
    weights = file.with_suffix(".bin")
    try:
        ov.save_model(model, file, compress_to_fp16=False)
        tree = ET.parse(file)
    except (RuntimeError, ET.ParseError) as error:
        raise LlmoptError(f"`{file.name}` could not be written: {error}", hint=_ROOM) from error
    layers = tree.getroot().findall("./layers/layer")
    spans = [d for d in (layer.find("data") for layer in layers if layer.get("type") == "Const") if d is not None]
    needed = max((int(d.get("offset", 0)) + int(d.get("size", 0)) for d in spans), default=0)
    if weights.stat().st_size < needed:
        raise LlmoptError(f"`{weights.name}` could not be written: {needed} bytes are needed", hint=_ROOM)
    _renumber(layers)
    _mark_decompressions(layers)
    tree.write(file, encoding="utf-8", xml_declaration=True)


def save_tokenizer(model: Path, out: Path) -> None:
    """Write the tokenizer of a checkpoint as two OpenVINO models, and as the tokenizer.json that servers read.

    Code that came with the checkpoint is not run: left to itself, transformers would ask on the terminal whether to.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        pair = ov_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # whatever its parsers raise, it is this tokenizer that they cannot take
        if read_json(model / "tokenizer_config.json").get("auto_map"):
            raise LlmoptError(
                f"the tokenizer of `{model}` is code of its own (`auto_map` in tokenizer_config.json), and llmopt runs "
                "none that comes with a checkpoint, whoever trusts it",
                hint="put a `tokenizer.json` beside the weights and take `auto_map` out of tokenizer_config.json",
            ) from error
        raise LlmoptError(f"the tokenizer of `{model}` cannot be converted for OpenVINO: {error}") from error
    for converted, name in zip(pair, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        save(converted, out / name)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))  # where the checkpoint has one, that replaces it


def _renumber(layers: list[ET.Element]) -> None:
    """Number the names that OpenVINO made from a counter of the process by the order in which the file has them."""
    numbers: dict[str, int] = {}

    def renamed(name: str) -> str:
        match = _COUNTED.fullmatch(name)
        return f"{match[1]}_{numbers.setdefault(match[2], len(numbers))}{match[3]}" if match else name

    for layer in layers:
        layer.set("name", renamed(layer.get("name", "")))
        for element, key in ((layer, "output_names"), *((port, "names") for port in layer.iterfind("./output/port"))):
            if element.get(key):
                element.set(key, ",".join(sorted(renamed(name) for name in element.get(key, "").split(","))))


def _mark_decompressions(layers: list[ET.Element]) -> None:
    """Mark what widens a half-precision matrix, so that the plugin keeps the matrix as it is.

    Unmarked, the CPU plugin folds the conversion and holds every matrix in float32 (4 times the memory of BF16, and
    more). The mark is an attribute of the graph that Python cannot set, only the file can.
    """
    for layer in layers:
        if layer.get("type") == "Convert" and layer.get("name", "").endswith(DECOMPRESSED):
            info = ET.Element("rt_info")
            ET.SubElement(info, "attribute", name="decompression", version="0")
            layer.insert(1, info)  # after <data>
