"""Every mutation of every tensor of every layout is found, and what is in order passes.

Checkpoints are made from the layout with random bytes: whether it is the right layout is for ModelOpt to judge
(tests/golden/trt_llm).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt.compilers.inspection import CHECKSUMS, SCALES
from llmopt.compilers.trt_llm.config import EngineConfig
from llmopt.compilers.trt_llm.layout import layout
from llmopt.compilers.trt_llm.validate import validate
from llmopt.errors import CorruptError, LlmoptError
from llmopt.formats.base import Part
from llmopt.models.writer import write_safetensors

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
_LLAMA: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "dtype": "bfloat16",
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 32,
    "hidden_size": 128,
    "intermediate_size": 384,
    "vocab_size": 96,
    "max_positions": 256,
    "norm_epsilon": 1e-05,
    "activation": "silu",
    "norms": ("input_layernorm", "post_layernorm"),
    "qkv_bias": False,
    "dense_bias": False,
    "mlp_bias": False,
    "rotary_base": 10000.0,
    "rotary_pct": 1.0,
    "rotary_scaling": None,
    "algorithm": None,
    "group_size": 0,
    "kv_cache": "none",
    "plain": (),
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
}
_W4 = {"algorithm": "W4A16_AWQ", "group_size": 64}
_FP8 = {"algorithm": "FP8", "kv_cache": "fp8"}
_SQ, _TOKENS = {"algorithm": "W8A8_SQ_PER_CHANNEL"}, {"algorithm": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"}
_QWEN2 = {"architecture": "Qwen2ForCausalLM", "qkv_bias": True}
_NEOX = {
    "architecture": "GPTNeoXForCausalLM",
    "norms": ("input_layernorm", "post_attention_layernorm"),
    "intermediate_size": 512,
    "activation": "gelu",
    "kv_heads": 4,
    "qkv_bias": True,
    "dense_bias": True,
    "mlp_bias": True,
}
_TP2, _PP2 = {"tensor_parallel": 2}, {"pipeline_parallel": 2}

LAYOUTS: dict[str, EngineConfig] = {
    name: EngineConfig(**_LLAMA | changes)
    for name, changes in {
        "plain": {},
        "plain-fp16-tp2": {"dtype": "float16", **_TP2},
        "plain-tp2-pp2": {**_TP2, **_PP2},
        "w4-tp2": {**_W4, **_TP2},
        "w4-pp2": {**_W4, **_PP2},
        "fp8-tp2": {**_FP8, **_TP2},
        "fp8-pp2": {**_FP8, **_PP2},
        "fp8-one-plain": {**_FP8, "plain": ("transformer.layers.0.mlp.proj",)},
        "smoothquant-int8-cache-tp2": {**_SQ, "kv_cache": "int8", **_TP2},
        "tokens-tp2": {**_TOKENS, **_TP2},
        "qwen2-w4-tp2": {**_QWEN2, **_W4, **_TP2},
        "gpt-neox-w4": {**_NEOX, **_W4},
        "one-kv-head-tp2": {"kv_heads": 1, **_TP2},
    }.items()
}

Ranks = dict[int, dict[str, torch.Tensor]]


def tensors_of(config: EngineConfig) -> Ranks:
    """Random tensors of a layout: those that are not split are the same on all ranks of a stage."""
    whole = EngineConfig.parse(config.to_json() | {"mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1}, "rank": 0})
    unsplit = layout(whole, 0)
    ranks = {
        rank: {
            name: _random(part, name, stage if part == unsplit.get(name) else rank + 10)
            for stage in [rank // config.tensor_parallel]
            for name, part in layout(config, rank).items()
        }
        for rank in range(config.ranks)
    }
    if config.kv_heads < config.tensor_parallel:  # then all ranks have one head here: the last rows
        rows = 2 * config.head_size
        for rank, tensors in ranks.items():
            for name in [name for name in tensors if name.endswith("attention.qkv.weight")]:
                tensors[name][-rows:] = ranks[rank - rank % config.tensor_parallel][name][-rows:]
    for tensors in ranks.values():
        for name in [name for name in tensors if name.endswith(".kv_cache_scaling_factor")]:
            prefix = name.removesuffix("kv_cache_scaling_factor")
            tensors[name] = torch.maximum(*(tensors[f"{prefix}{each}_cache_scaling_factor"] for each in "kv"))
    return ranks


def _random(part: Part, name: str, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    dtype, shape = part.dtypes[0], part.shapes[0]
    if dtype in ("I8", "F8_E4M3"):
        return torch.randint(0, 120, shape, generator=draw, dtype=torch.int8).view(_DTYPES[dtype])
    values = torch.rand(shape, generator=draw) + 0.5
    return (values if name.rpartition(".")[2] in SCALES else values - 1).to(_DTYPES[dtype])


def write(folder: Path, config: Mapping[str, Any], ranks: Ranks) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    for rank, tensors in ranks.items():
        write_safetensors(folder / f"rank{rank}.safetensors", tensors, sync=False)
    return folder


def faults(folder: Path) -> str:
    with pytest.raises(CorruptError) as caught:
        validate(folder)
    return caught.value.message


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_in_order_passes(name: str, tmp_path: Path) -> None:
    config = LAYOUTS[name]
    folder = write(tmp_path, config.to_json(), tensors_of(config))
    report = validate(folder)
    assert (report.what, report.ranks, report.digests) == ("checkpoint of TensorRT-LLM", config.ranks, 0)
    assert report.tensors == sum(len(layout(config, rank)) for rank in range(config.ranks))
    validate(folder, record=True)
    assert validate(folder).digests == report.tensors + 1
    assert validate(folder).to_json()["bytes"] == report.bytes > 0


Mutation = Callable[[torch.Tensor], torch.Tensor | None]


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    others = {torch.float32: torch.float16, torch.int8: torch.uint8, torch.float8_e4m3fn: torch.float16}
    return tensor.to(others.get(tensor.dtype, torch.float32))


def _first(value: float) -> Mutation:
    def change(tensor: torch.Tensor) -> torch.Tensor | None:
        if not tensor.is_floating_point():
            return None
        changed = tensor.float().clone()
        changed.view(-1)[0] = value
        return changed.to(tensor.dtype)

    return change


#: What can become of one tensor; None: does not apply to it.
MUTATIONS: dict[str, Mutation] = {
    "transposed": lambda tensor: tensor.T.contiguous() if tensor.dim() == 2 and len(set(tensor.shape)) == 2 else None,
    "cast": _cast,
    "shortened": lambda tensor: tensor[:-1].clone() if tensor.shape[0] > 1 else None,
    "flattened": lambda tensor: tensor.reshape(-1) if tensor.dim() == 2 else None,
    "nan": _first(float("nan")),
    "infinite": lambda tensor: None if tensor.dtype == torch.float8_e4m3fn else _first(float("inf"))(tensor),
}


def each_tensor(ranks: Ranks) -> Iterator[tuple[int, str]]:
    """Every tensor of the last block, and outside of the blocks, of the first and of the last rank."""
    for rank in sorted({0, len(ranks) - 1}):
        last = max(name.split(".")[2] for name in ranks[rank] if name.startswith("transformer.layers."))
        for name in ranks[rank]:
            if not name.startswith("transformer.layers.") or name.split(".")[2] == last:
                yield rank, name


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_mutated_tensor_is_found(name: str, mutation: str, tmp_path: Path) -> None:
    config, changed = LAYOUTS[name], 0
    ranks = tensors_of(config)
    write(tmp_path, config.to_json(), ranks)
    for rank, tensor in each_tensor(ranks):
        mutated = MUTATIONS[mutation](ranks[rank][tensor])
        if mutated is None:
            continue
        changed += 1
        write(tmp_path, config.to_json(), {rank: ranks[rank] | {tensor: mutated}})
        said = faults(tmp_path)
        assert f"rank{rank}.safetensors: `{tensor}`" in said
        write(tmp_path, config.to_json(), {rank: ranks[rank]})
    assert changed > 5
    validate(tmp_path)


@pytest.mark.parametrize("value", [0.0, -0.5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_scale_that_is_not_positive_is_found(name: str, value: float, tmp_path: Path) -> None:
    config = LAYOUTS[name]
    ranks = tensors_of(config)
    scales = [(rank, each) for rank, each in each_tensor(ranks) if each.rpartition(".")[2] in SCALES]
    assert bool(scales) == (config.algorithm is not None)
    write(tmp_path, config.to_json(), ranks)
    for rank, tensor in scales:
        mutated = _first(value)(ranks[rank][tensor])
        assert mutated is not None
        write(tmp_path, config.to_json(), {rank: ranks[rank] | {tensor: mutated}})
        assert f"rank{rank}.safetensors: `{tensor}` has 1 of" in faults(tmp_path)
        write(tmp_path, config.to_json(), {rank: ranks[rank]})


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_an_extra_and_a_renamed_tensor_are_found(name: str, tmp_path: Path) -> None:
    config = LAYOUTS[name]
    ranks = tensors_of(config)
    write(tmp_path, config.to_json(), ranks)
    for rank, tensor in each_tensor(ranks):
        file, rest = f"rank{rank}.safetensors", {k: v for k, v in ranks[rank].items() if k != tensor}
        write(tmp_path, config.to_json(), {rank: rest})
        assert f"{file}: `{tensor}` is missing" in faults(tmp_path)
        renamed = tensor.replace("transformer", "model").replace("lm_head", "head")
        write(tmp_path, config.to_json(), {rank: rest | {renamed: ranks[rank][tensor]}})
        said = faults(tmp_path)
        assert f"`{tensor}` is missing" in said
        assert f"(is `{renamed}` this one?)" in said
        write(tmp_path, config.to_json(), {rank: ranks[rank] | {renamed: ranks[rank][tensor]}})
        assert f"{file}: `{renamed}`," in faults(tmp_path)
        write(tmp_path, config.to_json(), {rank: ranks[rank]})


@pytest.mark.parametrize("name", [name for name, config in LAYOUTS.items() if config.tensor_parallel > 1])
def test_a_tensor_of_another_rank_is_found(name: str, tmp_path: Path) -> None:
    """Without digests where it must be the same, or where both ranks have it then; swapped both ways with them."""
    config = LAYOUTS[name]
    ranks = tensors_of(config)
    write(tmp_path, config.to_json(), ranks)
    validate(tmp_path, record=True)
    for tensor in ranks[0]:
        one, other = ranks[0][tensor], ranks[1][tensor]
        alike = one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        if alike:
            continue
        swapped = {0: ranks[0] | {tensor: other}, 1: ranks[1] | {tensor: one}}
        write(tmp_path, config.to_json(), swapped)
        said = faults(tmp_path)
        assert f"rank0.safetensors: `{tensor}` has the bytes of `{tensor}` of rank1.safetensors" in said
        assert f"rank1.safetensors: `{tensor}` has the bytes of `{tensor}` of rank0.safetensors" in said
        if tensor.endswith(".weight"):
            (tmp_path / CHECKSUMS).rename(tmp_path.parent / CHECKSUMS)
            write(tmp_path, config.to_json(), {0: ranks[0], 1: swapped[1]})
            assert f"rank1.safetensors: `{tensor}` is the part of rank 0" in faults(tmp_path)
            (tmp_path.parent / CHECKSUMS).rename(tmp_path / CHECKSUMS)
    write(tmp_path, config.to_json(), ranks)
    validate(tmp_path)


@pytest.mark.parametrize("name", [name for name, config in LAYOUTS.items() if config.tensor_parallel > 1])
def test_what_every_rank_must_have_alike_is_compared_without_digests(name: str, tmp_path: Path) -> None:
    config = LAYOUTS[name]
    ranks = tensors_of(config)
    write(tmp_path, config.to_json(), ranks)
    alike = [
        tensor
        for tensor in ranks[0]
        if torch.equal(ranks[0][tensor].view(torch.uint8), ranks[1][tensor].view(torch.uint8))
        and not tensor.endswith("kv_cache_scaling_factor")
    ]
    assert any("layernorm" in tensor for tensor in alike)
    for tensor in alike:
        mutated = ranks[1][tensor].clone()
        mutated.view(torch.uint8).view(-1)[0] ^= 1
        write(tmp_path, config.to_json(), {1: ranks[1] | {tensor: mutated}})
        assert f"rank1.safetensors: `{tensor}` is not what it is on rank 0" in faults(tmp_path)


def test_a_scale_of_the_kv_cache_that_is_not_the_larger_of_two_is_found(tmp_path: Path) -> None:
    config = LAYOUTS["fp8-pp2"]
    ranks = tensors_of(config)
    write(tmp_path, config.to_json(), ranks)
    name = "transformer.layers.0.attention.kv_cache_scaling_factor"
    write(tmp_path, config.to_json(), {1: ranks[1] | {name: ranks[1][name] * 2}})
    assert f"rank1.safetensors: `{name}` is not the larger of those of keys and values" in faults(tmp_path)


def test_a_kv_head_that_differs_from_that_of_its_other_rank_is_found(tmp_path: Path) -> None:
    config = LAYOUTS["one-kv-head-tp2"]
    ranks = tensors_of(config)
    write(tmp_path, config.to_json(), ranks)
    validate(tmp_path)
    name = "transformer.layers.1.attention.qkv.weight"
    for row, is_fault in ((-1, True), (0, False)):
        changed = ranks[1][name].clone()
        changed[row] += 1
        write(tmp_path, config.to_json(), {1: ranks[1] | {name: changed}})
        if is_fault:
            assert f"rank1.safetensors: `{name}` has other rows of the KV head" in faults(tmp_path)
        else:
            validate(tmp_path)


def test_an_artifact_that_says_something_else_of_itself_is_found(tmp_path: Path) -> None:
    config = LAYOUTS["fp8-tp2"]
    write(tmp_path / "checkpoint", config.to_json(), tensors_of(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    about = {"tensor_parallel": 2, "pipeline_parallel": 1, "dtype": "bfloat16", "quant_algo": "FP8", "kv_cache": "FP8"}
    (tmp_path / "engine.json").write_text(json.dumps(about))
    validate(tmp_path)
    for key, wrong in {"tensor_parallel": 1, "dtype": "float16", "quant_algo": None, "kv_cache": None}.items():
        (tmp_path / "engine.json").write_text(json.dumps(about | {key: wrong}))
        assert f"engine.json: says `{key}: {wrong}` where config.json" in faults(tmp_path)


def test_siblings_of_one_shape_that_changed_places_are_found(tmp_path: Path) -> None:
    config = LAYOUTS["w4-tp2"]
    ranks = tensors_of(config)
    write(tmp_path, config.to_json(), ranks)
    validate(tmp_path, record=True)
    for tensor in ("weight", "weights_scaling_factor", "prequant_scaling_factor"):
        gate, fc = f"transformer.layers.0.mlp.gate.{tensor}", f"transformer.layers.0.mlp.fc.{tensor}"
        write(tmp_path, config.to_json(), {0: ranks[0] | {gate: ranks[0][fc], fc: ranks[0][gate]}})
        assert f"`{gate}` has the bytes of `{fc}`" in faults(tmp_path)


@pytest.mark.parametrize("key", [key for key in LAYOUTS["fp8-tp2"].to_json() if key not in ("producer", "rank")])
def test_every_edit_of_config_json_is_found(key: str, tmp_path: Path) -> None:
    """By what it says, or by its digest; a field that is gone takes the loader's default."""
    config = LAYOUTS["fp8-tp2"]
    said = config.to_json()
    write(tmp_path, said, tensors_of(config))
    validate(tmp_path, record=True)
    for edited in (_edited(said, key), {name: value for name, value in said.items() if name != key}):
        (tmp_path / "config.json").write_text(json.dumps(edited, indent=4))
        assert "config.json: " in faults(tmp_path)


def _edited(said: Mapping[str, Any], key: str) -> dict[str, Any]:
    match said[key]:
        case bool():
            value: Any = not said[key]
        case int() | float():
            value = said[key] * 2 + 1
        case str():
            value = said[key] + "x"
        case dict():
            value = {name: each * 2 if isinstance(each, int) else "x" for name, each in said[key].items()}
        case _:
            value = "x"
    return dict(said) | {key: value}


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_found(size: int, tmp_path: Path) -> None:
    config = LAYOUTS["fp8-tp2"]
    write(tmp_path, config.to_json(), tensors_of(config))
    file = tmp_path / "rank1.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    assert "rank1.safetensors: is truncated" in faults(tmp_path)


def test_bytes_too_many_and_tensors_over_each_other_are_found(tmp_path: Path) -> None:
    config = LAYOUTS["plain"]
    write(tmp_path, config.to_json(), tensors_of(config))
    file = tmp_path / "rank0.safetensors"
    data = file.read_bytes()
    file.write_bytes(data + b"more")
    assert "has 4 bytes that belong to no tensor" in faults(tmp_path)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["transformer.layers.1.mlp.fc.weight"] = header["transformer.layers.0.mlp.fc.weight"]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert "the bytes of `transformer.layers.1.mlp.fc.weight` do not follow" in faults(tmp_path)


def test_a_damaged_header_is_a_fault_and_no_traceback(tmp_path: Path) -> None:
    config = LAYOUTS["plain"]
    write(tmp_path, config.to_json(), tensors_of(config))
    for text in (b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"[1, 2]", b"not json"):
        (tmp_path / "rank0.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        assert "rank0.safetensors: has a damaged header" in faults(tmp_path)


def test_missing_and_stray_rank_files_are_found(tmp_path: Path) -> None:
    config = LAYOUTS["plain-tp2-pp2"]
    write(tmp_path, config.to_json(), tensors_of(config))
    (tmp_path / "rank2.safetensors").rename(tmp_path / "rank4.safetensors")
    said = faults(tmp_path)
    assert "rank4.safetensors: does not belong here" in said
    assert "rank2.safetensors: " in said
    assert "2 faults" in said


def test_all_faults_are_told_at_once_and_no_more_than_fit(tmp_path: Path) -> None:
    config = LAYOUTS["plain-tp2-pp2"]
    ranks = tensors_of(config)
    write(
        tmp_path,
        config.to_json(),
        {rank: {"x": tensors["transformer.layers.0.mlp.fc.weight"]} for rank, tensors in ranks.items()},
    )
    said = faults(tmp_path)
    assert f"{len(said.splitlines()) - 2} of" not in said
    assert len(said.splitlines()) == 22
    assert said.splitlines()[-1].strip().startswith("and ")


def test_a_file_that_changed_or_came_later_is_found(tmp_path: Path) -> None:
    config = LAYOUTS["plain"]
    write(tmp_path, config.to_json(), tensors_of(config))
    (tmp_path / "notes.json").write_text("{}")
    validate(tmp_path, record=True)
    (tmp_path / "notes.json").unlink()
    (tmp_path / "later.json").write_text("{}")
    said = faults(tmp_path)
    assert "notes.json: is missing" in said
    assert "later.json: was not there" in said
    (tmp_path / CHECKSUMS).write_text("{}")
    assert f"{CHECKSUMS}: is not of the schema" in faults(tmp_path)


def test_an_artifact_needs_a_tokenizer_that_fits(tmp_path: Path) -> None:
    config = LAYOUTS["plain"]
    write(tmp_path / "checkpoint", config.to_json(), tensors_of(config))
    assert "tokenizer.json: is missing" in faults(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 96}}}))
    assert "tokenizer.json: has the id 96 where the embedding has 96 rows" in faults(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 95}}}))
    assert validate(tmp_path).ranks == 1


def test_an_artifact_without_the_config_of_its_checkpoint_is_a_broken_one(tmp_path: Path) -> None:
    config = LAYOUTS["plain"]
    write(tmp_path / "checkpoint", config.to_json(), tensors_of(config))
    (tmp_path / "checkpoint" / "config.json").unlink()
    assert "config.json: is missing" in faults(tmp_path)


def test_what_is_no_checkpoint_is_told_apart_from_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="nothing that was prepared") as caught:
        validate(tmp_path)
    assert not isinstance(caught.value, CorruptError)


@pytest.mark.parametrize("value", [None, "x", [], [1], {"a": 1}, 10**30], ids=str)
def test_a_value_of_another_type_is_a_fault_and_no_traceback(value: object, tmp_path: Path) -> None:
    config = LAYOUTS["fp8-tp2"]
    write(tmp_path, config.to_json(), tensors_of(config))
    for key in ("dtype", "num_hidden_layers", "architecture", "mapping", "quantization"):
        (tmp_path / "config.json").write_text(json.dumps(config.to_json() | {key: value}))
        assert "config.json: " in faults(tmp_path), key
