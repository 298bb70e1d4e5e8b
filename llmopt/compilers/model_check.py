"""Check a checkpoint of Hugging Face, plain or in a format that we read, against everything that its files say.

`open_model` ends at the first thing that it cannot work with; here every fault is found, and also what it passes over:
tensors too many, and files that disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llmopt.compilers.hub_model import TOKENIZERS
from llmopt.compilers.inspection import (
    Checksums,
    Faults,
    Report,
    check_counts,
    compare,
    conclude,
    look_at_all,
    read_json,
    read_tensors,
    stray_weights,
    told,
)
from llmopt.errors import LlmoptError
from llmopt.formats.base import HALVES, Part, QuantizedReader
from llmopt.formats.reading import linears, open_quantized
from llmopt.models.checkpoint import FLOATS, Checkpoint, TensorInfo
from llmopt.models.config import DecoderConfig
from llmopt.models.facts import Facts

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_QUANTIZATION = "hf_quant_config.json"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
#: What old checkpoints carry along and every runtime computes itself.
_IGNORED = ("rotary_emb.inv_freq", "attention.masked_bias", "attention.bias")


def check_model(folder: Path, what: str, *, tensorrt: bool = False, record: bool = False) -> Report:
    """Every file and every value of a checkpoint; `what` it is in words. `record` writes CHECKSUMS.

    tensorrt: whether it also has to have what TensorRT-LLM asks for and others do not.

    Raises CorruptError that lists the faults.
    """
    faults = Faults()
    sums, tensors = Checksums.read(folder, faults), _read_files(folder, faults)
    values, vocabulary, unfit = read_json(folder / "config.json", faults), None, set[str]()
    if values is not None and check_counts("config.json", values, faults):
        beside = read_json(folder / _QUANTIZATION, faults) if (folder / _QUANTIZATION).exists() else None
        with told(faults, _QUANTIZATION):
            _check_quantization(values.get("quantization_config"), beside, faults, tensorrt=tensorrt)
        with told(faults, "config.json"):
            if beside is not None:
                own = values.get("quantization_config") or {}
                values["quantization_config"] = {"quant_method": "modelopt", **own, **beside}
            found = {name: info for each in tensors.values() for name, info in each.items()}
            vocabulary, unfit = _check_tensors(Checkpoint(folder, values, found), faults, tensorrt=tensorrt)
    check_tokenizer(folder, vocabulary, faults)
    seen = look_at_all(tensors, dict.fromkeys(tensors, unfit), faults)
    return conclude(folder, what, tensors, seen, sums, faults, record=record)


def check_tokenizer(folder: Path, vocabulary: int | None, faults: Faults) -> None:
    """That there is one, and that the embedding has a row for each of its ids."""
    names = [name for name in TOKENIZERS if (folder / name).is_file()]
    if not names:
        faults.add(TOKENIZERS[0], "is missing: no other tokenizer is there either")
    for name in ("tokenizer_config.json", "generation_config.json", *names):
        if not name.endswith(".json") or not (folder / name).exists():
            continue
        said = read_json(folder / name, faults)
        if name == "tokenizer.json" and said is not None and vocabulary is not None:
            with told(faults, name):
                largest = max(_ids(said), default=-1)
                if largest >= vocabulary:
                    faults.add(name, f"has the id {largest} where the embedding has {vocabulary} rows")


def _ids(tokenizer: Mapping[str, Any]) -> Iterator[int]:
    words = (tokenizer.get("model") or {}).get("vocab") or {}
    yield from (range(len(words)) if isinstance(words, list) else words.values())
    yield from (token["id"] for token in tokenizer.get("added_tokens") or ())


def _read_files(folder: Path, faults: Faults) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of the files that belong to the checkpoint, compared with its index where it has one."""
    if (folder / _SINGLE).exists():
        stray_weights(folder, [_SINGLE], faults)
        if (folder / _INDEX).exists():
            faults.add(_INDEX, f"lies beside `{_SINGLE}`, and only one of them can hold")
        return {_SINGLE: read_tensors(folder / _SINGLE, faults)}
    index = read_json(folder / _INDEX, faults)
    if index is None:
        return {}
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        faults.add(_INDEX, "has no `weight_map`")
        return {}
    outside = sorted({file for file in places.values() if Path(file).name != file})
    for file in outside:
        faults.add(_INDEX, f"names `{file}`, which lies outside of the folder")
    files = sorted(set(places.values()) - set(outside))
    stray_weights(folder, files, faults)
    tensors = {file: read_tensors(folder / file, faults) for file in files}
    for name, file in places.items():
        if file in tensors and name not in tensors[file] and (folder / file).exists():
            faults.add(file, f"lacks `{name}`, which the index promises")
    for file, found in tensors.items():
        for name in found:
            if places.get(name) != file:
                other = f"says that it is in {places[name]}" if name in places else "does not name it"
                faults.add(file, f"has `{name}`, and the index {other}")
    total = (index.get("metadata") or {}).get("total_size")
    held = sum(info.size for found in tensors.values() for info in found.values())
    if total is not None and total != held:
        faults.add(_INDEX, f"says {total} bytes of tensors where there are {held}")
    return tensors


def _check_quantization(
    own: Mapping[str, Any] | None, beside: Mapping[str, Any] | None, faults: Faults, *, tensorrt: bool
) -> None:
    """config.json and hf_quant_config.json of ModelOpt: one is what vLLM reads, the other what TensorRT-LLM does."""
    if beside is None:
        if tensorrt and own is not None and own.get("quant_method") == "modelopt":
            faults.add(_QUANTIZATION, "is missing, where TensorRT-LLM looks")
        return
    said = beside.get("quantization")
    if not isinstance(said, Mapping):
        faults.add(_QUANTIZATION, "has no `quantization`")
        return
    if own is None:  # as ModelOpt had it once; loaders read the other then
        return
    cache = "FP8" if own.get("kv_cache_scheme") else None
    for here, there, one, other in (
        ("quant_algo", "quant_algo", own.get("quant_algo"), said.get("quant_algo")),
        ("ignore", "exclude_modules", _names(own.get("ignore")), _names(said.get("exclude_modules"))),
        ("quantized_layers", "quantized_layers", own.get("quantized_layers"), said.get("quantized_layers")),
        ("kv_cache_scheme", "kv_cache_quant_algo", cache, said.get("kv_cache_quant_algo")),
    ):
        if one != other:
            faults.add(_QUANTIZATION, f"says `{there}: {other}` where `{here}` of config.json says `{one}`")


def _names(modules: list[str] | None) -> list[str]:
    return sorted(modules or ())


def _check_tensors(checkpoint: Checkpoint, faults: Faults, *, tensorrt: bool) -> tuple[int, set[str]]:
    """Names, dtypes and shapes; returns the rows of the embedding and what does not fit."""
    config, reader = DecoderConfig.parse(checkpoint), open_quantized(checkpoint)
    dtype = _usual_dtype(checkpoint, config)
    expected = _layout(checkpoint, config, reader, dtype)
    if reader is not None:
        _check_excluded(config, reader, faults)
        if tensorrt:
            _check_smooth(config, reader, faults)
    present = {name: info for name, info in checkpoint.tensors.items() if not name.endswith(_IGNORED)}
    unfit = compare("weights", present, expected, faults)
    for key in ("dtype", "torch_dtype"):
        said = checkpoint.config.get(key)
        if _DTYPES.get(str(said), dtype) != dtype:
            faults.add("config.json", f"says `{key}: {said}` where the weights are {dtype}")
    return config.vocab_size, unfit


def _usual_dtype(checkpoint: Checkpoint, config: DecoderConfig) -> str:
    """That of most plain matrices, so that one which differs is the fault."""
    tensors = checkpoint.tensors.items()
    counts = Counter(info.dtype for name, info in tensors if name.endswith(".weight") and len(info.shape) == 2)
    floats = [dtype for dtype, _ in counts.most_common() if dtype in FLOATS]
    return floats[0] if floats else config.dtype


def _layout(
    checkpoint: Checkpoint, config: DecoderConfig, reader: QuantizedReader | None, dtype: str
) -> dict[str, Part]:
    """Every tensor that config.json asks for. LlmoptError for what is not supported."""
    head, plain = f"{config.family.head}.weight", dict(config.outer_shapes())
    tied = Facts.of(checkpoint.config).flag("tie_word_embeddings")
    if not tied or head in checkpoint.tensors:  # a tied head may be said twice
        plain[head] = (config.vocab_size, config.hidden_size)
    for index in range(config.layers):
        plain |= {f"{config.block(index)}.{name}": shape for name, shape in config.block_shapes(index).items()}
    # Norms and biases may be in another float than the weights, as some models have them.
    dtypes = tuple(dict.fromkeys((dtype, "F32")))
    expected = {name: Part(dtypes[:1] if len(shape) == 2 else dtypes, (shape,)) for name, shape in plain.items()}
    if reader is None:
        return expected
    for prefix, shape in linears(config).items():
        if f"{prefix}.weight" in expected and reader.encoding.scheme(prefix) is not None:
            layout = _linear_layout(checkpoint, reader, prefix, shape)
            if layout is not None:
                del expected[f"{prefix}.weight"]
                expected |= {f"{prefix}.{suffix}": part for suffix, part in layout.items()}
    return expected | _kv_layout(checkpoint, config, reader)


def _linear_layout(
    checkpoint: Checkpoint, reader: QuantizedReader, prefix: str, shape: tuple[int, int]
) -> dict[str, Part] | None:
    """The tensors of a linear by suffix, None where it is plain."""
    suffixes = {name.removeprefix(f"{prefix}.") for name in checkpoint.tensors if name.startswith(f"{prefix}.")}
    weight = checkpoint.tensors.get(f"{prefix}.weight")
    if weight is not None and weight.dtype in FLOATS:
        return None
    scheme = reader.encoding.scheme(prefix)
    assert scheme is not None
    try:
        layout = dict(reader.encoding.layout(shape, scheme, suffixes))
    except LlmoptError as error:
        raise LlmoptError(f"`{prefix}`: {error.message}", hint=error.hint) from None
    return layout | ({"input_scale": Part(HALVES, ((1,), ()))} if scheme.activations == "static" else {})


def _kv_layout(checkpoint: Checkpoint, config: DecoderConfig, reader: QuantizedReader) -> dict[str, Part]:
    """Scales of the KV cache: where one block has them all have, of both keys and values."""
    if reader.encoding.kv_cache == "none":
        return {}
    found: set[str] = set()
    for index in range(config.layers):
        prefix = f"{config.block(index)}."
        names = [name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)]
        found |= {_of_keys(name) for name in names if name.endswith((".k_scale", ".v_scale"))}
    both = found | {name.replace("k_proj.", "v_proj.").replace("k_scale", "v_scale") for name in found}
    part = Part(HALVES, ((), (1,)))
    return {f"{config.block(index)}.{name}": part for index in range(config.layers) for name in both}


def _of_keys(name: str) -> str:
    return name.replace("v_proj.", "k_proj.").replace("v_scale", "k_scale")


def _check_excluded(config: DecoderConfig, reader: QuantizedReader, faults: Faults) -> None:
    """ModelOpt's config names what stays plain: a loader makes scales of ones for the rest, and tells nobody."""
    said = reader.checkpoint.config["quantization_config"]
    if said.get("quant_method") != "modelopt":
        return
    said = said.get("quantization") or said
    excluded, layers = said.get("exclude_modules") or said.get("ignore") or (), said.get("quantized_layers")
    for prefix in linears(config):
        listed = not any(fnmatch(prefix, pattern) for pattern in excluded) if layers is None else prefix in layers
        plain = reader.checkpoint.tensors.get(f"{prefix}.weight")
        if plain is not None and (plain.dtype in FLOATS) == listed:
            is_so, other = ("is plain", "quantized") if listed else (f"is {plain.dtype}", "plain")
            faults.add("weights", f"`{prefix}.weight` {is_so} where {_QUANTIZATION} has it {other}")


def _check_smooth(config: DecoderConfig, reader: QuantizedReader, faults: Faults) -> None:
    """`pre_quant_scale` of 4-bit linears: in each that is not fused with others, and in all of those or in none."""
    for index in range(config.layers):
        for site in config.sites(index):
            prefixes = [f"{config.block(index)}.{name}" for name in site.linears]
            have = [f"{prefix}.pre_quant_scale" in reader.checkpoint.tensors for prefix in prefixes]
            fourbit = [scheme is not None and scheme.bits == 4 for scheme in map(reader.encoding.scheme, prefixes)]
            for prefix, has, four in zip(prefixes, have, fourbit, strict=True):
                if four and not has and (len(prefixes) == 1 or any(have)):
                    faults.add("weights", f"`{prefix}.pre_quant_scale` is missing: {config.dtype} [in features]")
