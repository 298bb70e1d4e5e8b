"""Every mutation of a bundle is found: of every tensor, of the index, of both configs and of the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmopt.artifacts.outcome import silent
from llmopt.compilers.inspection import CHECKSUMS, SCALES
from llmopt.compilers.trt_llm import bundle
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.compilers.trt_llm.validate import validate
from llmopt.errors import CorruptError
from llmopt.formats.scheme import Scheme
from llmopt.models.writer import write_safetensors

W4 = Scheme(bits=4, group_size=32, symmetric=True)
W8 = Scheme(bits=8, group_size=-1, symmetric=True)
FP8 = Scheme(bits=8, group_size=0, symmetric=True, activations="static", kind="float")
FP8_ROWS = replace(FP8, group_size=-1, activations="dynamic")
SCHEMES: dict[str, Callable[[str], Scheme | None] | None] = {
    "plain": None,
    "w4": lambda prefix: W4,
    "w8": lambda prefix: W8,
    "fp8": lambda prefix: FP8,
    "fp8-rows": lambda prefix: FP8_ROWS,
    "mixed": lambda prefix: FP8 if "mlp" in prefix else None if "o_proj" in prefix else W8,
}
_FILE = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def bundles(make_checkpoint: Any, quantize: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """bundles(name) -> a bundle of SCHEMES in one file; FP8 with scales of an FP8 KV cache. Copy it to change it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            scheme = SCHEMES[name]
            plain = make_checkpoint("llama", hidden_size=32, head_dim=16, intermediate_size=64)
            model = plain if scheme is None else quantize(plain, scheme)
            out = made[name] = tmp_path_factory.mktemp(name)
            bundle.write(model, out, Settings(mode="bundle"), silent)
            tensors: Tensors = {}
            for file in sorted(out.glob("*.safetensors")):
                tensors |= load_file(file)
                file.unlink()
            (out / "model.safetensors.index.json").unlink(missing_ok=True)
            if name == "fp8":
                _add_kv_cache(out, tensors)
            write_safetensors(out / _FILE, tensors)
        return made[name]

    return make


def _add_kv_cache(folder: Path, tensors: Tensors) -> None:
    for index in range(2):
        attention = f"model.layers.{index}.self_attn"
        tensors |= {f"{attention}.{each}_proj.{each}_scale": torch.tensor(0.5) for each in "kv"}
    edit(folder / "config.json", ["quantization_config"], kv_cache_scheme={"num_bits": 8, "type": "float"})
    edit(folder / "hf_quant_config.json", ["quantization"], kv_cache_quant_algo="FP8")


def edit(file: Path, path: list[str], **changes: Any) -> None:
    """Change keys of an object in a JSON file; None removes one."""
    said = json.loads(file.read_text())
    inner = said
    for key in path:
        inner = inner[key]
    for key, value in changes.items():
        inner.pop(key, None)
        if value is not None:
            inner[key] = value
    file.write_text(json.dumps(said))


def faults(folder: Path) -> str:
    with pytest.raises(CorruptError) as caught:
        validate(folder)
    return caught.value.message


@pytest.fixture
def copied(bundles: Callable[[str], Path], tmp_path: Path) -> Callable[[str], tuple[Path, Tensors]]:
    """copied(name) -> a bundle to change, and its tensors."""

    def copy(name: str) -> tuple[Path, Tensors]:
        folder = tmp_path / name
        shutil.copytree(bundles(name), folder)
        return folder, load_file(folder / _FILE)

    return copy


@pytest.mark.parametrize("name", SCHEMES)
def test_a_bundle_in_order_passes(copied: Any, name: str) -> None:
    folder, tensors = copied(name)
    report = validate(folder)
    assert (report.what, report.tensors, report.digests) == ("bundle for TensorRT-LLM", len(tensors), 0)
    validate(folder, record=True)
    assert validate(folder).digests > report.tensors


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    to = {torch.float8_e4m3fn: torch.bfloat16, torch.int8: torch.int32, torch.uint8: torch.int32}
    return tensor.to(to.get(tensor.dtype, torch.int8))


def _with(value: float) -> Callable[[torch.Tensor], torch.Tensor | None]:
    def change(tensor: torch.Tensor) -> torch.Tensor | None:
        if not tensor.is_floating_point():
            return None
        changed = tensor.float().clone()
        changed.view(-1)[0] = value
        return changed.to(tensor.dtype)

    return change


#: What can become of one tensor; None: does not apply to it.
MUTATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "transposed": lambda tensor: tensor.T.contiguous() if tensor.dim() == 2 and len(set(tensor.shape)) == 2 else None,
    "cast": _cast,
    "shortened": lambda tensor: tensor[:-1].clone() if tensor.dim() and tensor.shape[0] > 1 else None,
    "nan": _with(float("nan")),
}


def in_last_block_or_outside(tensors: Tensors) -> list[str]:
    return [name for name in tensors if not name.startswith("model.layers.0.")]


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_mutated_tensor_is_found(copied: Any, name: str, mutation: str) -> None:
    folder, tensors = copied(name)
    changed = 0
    for tensor in in_last_block_or_outside(tensors):
        mutated = MUTATIONS[mutation](tensors[tensor])
        if mutated is not None:
            changed += 1
            write_safetensors(folder / _FILE, tensors | {tensor: mutated}, sync=False)
            assert f"`{tensor}" in faults(folder), tensor
    assert changed > 3


@pytest.mark.parametrize("value", [0.0, -0.5])
@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "plain"])
def test_a_scale_that_is_not_positive_is_found(copied: Any, name: str, value: float) -> None:
    folder, tensors = copied(name)
    scales = [each for each in in_last_block_or_outside(tensors) if each.rpartition(".")[2] in SCALES]
    assert len(scales) > 5
    for tensor in scales:
        mutated = _with(value)(tensors[tensor])
        assert mutated is not None
        write_safetensors(folder / _FILE, tensors | {tensor: mutated}, sync=False)
        assert f"`{tensor}` has 1 of" in faults(folder)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_missing_an_extra_and_a_renamed_tensor_are_found(copied: Any, name: str) -> None:
    folder, tensors = copied(name)
    for tensor in in_last_block_or_outside(tensors):
        rest = {key: value for key, value in tensors.items() if key != tensor}
        write_safetensors(folder / _FILE, rest, sync=False)
        prefix = tensor.rpartition(".")[0]
        assert f"`{prefix}" in faults(folder) or "embed_tokens" in tensor, tensor
        renamed = tensor.replace("model.", "modell.").replace("lm_head", "head")
        write_safetensors(folder / _FILE, rest | {renamed: tensors[tensor]}, sync=False)
        assert f"`{prefix}" in faults(folder) or "embed_tokens" in tensor, tensor
        write_safetensors(folder / _FILE, tensors | {renamed: tensors[tensor]}, sync=False)
        assert f"`{renamed}`" in faults(folder), tensor


def test_a_head_that_is_gone_is_no_tied_one(copied: Any) -> None:
    folder, tensors = copied("plain")
    del tensors["lm_head.weight"]
    write_safetensors(folder / _FILE, tensors)
    assert "`lm_head.weight` is missing: BF16 [320, 32]" in faults(folder)


@pytest.mark.parametrize("name", SCHEMES)
def test_tensors_that_changed_places_are_found_by_their_digests(copied: Any, name: str) -> None:
    folder, tensors = copied(name)
    validate(folder, record=True)
    for suffix in {key.rpartition(".")[2] for key in tensors if ".mlp.up_proj." in key} - {"pre_quant_scale"}:
        up, gate = (f"model.layers.1.mlp.{each}_proj.{suffix}" for each in ("up", "gate"))
        if torch.equal(tensors[up].float(), tensors[gate].float()):
            continue
        write_safetensors(folder / _FILE, tensors | {up: tensors[gate], gate: tensors[up]})
        assert f"`{up}` has the bytes of `" in faults(folder)
    write_safetensors(folder / _FILE, tensors)
    validate(folder)


QUANTIZATION = "hf_quant_config.json"


@pytest.mark.parametrize(
    ("name", "file", "path", "changes", "message"),
    [
        ("fp8", QUANTIZATION, ["quantization"], {"quant_algo": "W8A16"}, "says `quant_algo: W8A16` where"),
        ("fp8", QUANTIZATION, ["quantization"], {"quant_algo": "NVFP4"}, "the ModelOpt algorithm `NVFP4`"),
        ("fp8", QUANTIZATION, ["quantization"], {"kv_cache_quant_algo": None}, "`kv_cache_quant_algo: None` where"),
        ("fp8", QUANTIZATION, ["quantization"], {"exclude_modules": None}, "says `exclude_modules: []` where"),
        ("fp8", "config.json", ["quantization_config"], {"ignore": ["lm_head", "x"]}, "where `ignore` of config.json"),
        ("w4", QUANTIZATION, ["quantization"], {"group_size": 16}, "`model.layers.0.self_attn.q_proj.weight_scale` is"),
        ("mixed", QUANTIZATION, ["quantization"], {"quantized_layers": {}}, "where hf_quant_config.json has it plain"),
        ("plain", "config.json", [], {"num_hidden_layers": 3}, "`model.layers.2.mlp.up_proj.weight` is missing"),
        (
            "plain",
            "config.json",
            [],
            {"num_hidden_layers": 1},
            "`model.layers.1.mlp.up_proj.weight`, BF16 [64, 32], do",
        ),
        ("plain", "config.json", [], {"intermediate_size": 96}, "is BF16 [64, 32] where BF16 [96, 32] belongs"),
        ("plain", "config.json", [], {"dtype": "float16"}, "says `dtype: float16` where the weights are BF16"),
        ("plain", "config.json", [], {"model_type": "lama"}, "the model type `lama` is not supported"),
        ("plain", "config.json", [], {"vocab_size": 256}, "where the embedding has 256 rows"),
        ("plain", "tokenizer_config.json", [], None, "is not JSON"),
    ],
)
def test_files_that_disagree_are_found(
    copied: Any, name: str, file: str, path: list[str], changes: dict[str, Any] | None, message: str
) -> None:
    folder, _ = copied(name)
    if changes is None:
        (folder / file).write_text("{")
    else:
        edit(folder / file, path, **changes)
    assert message in faults(folder)


def test_a_missing_quantization_config_is_found(copied: Any) -> None:
    folder, _ = copied("fp8")
    (folder / QUANTIZATION).unlink()
    assert f"{QUANTIZATION}: is missing, where TensorRT-LLM looks" in faults(folder)


def test_any_edit_is_found_by_the_digest_of_the_file(copied: Any) -> None:
    folder, _ = copied("plain")
    validate(folder, record=True)
    edit(folder / "config.json", [], rms_norm_eps=1e-3)
    assert "config.json: has changed since the checkpoint was prepared" in faults(folder)
    (folder / CHECKSUMS).unlink()
    validate(folder)


def test_a_missing_tokenizer_is_found(copied: Any) -> None:
    folder, _ = copied("plain")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: is missing" in faults(folder)


@pytest.fixture
def sharded(copied: Any) -> tuple[Path, dict[str, Any]]:
    """A bundle in two files, and its index."""
    folder, tensors = copied("plain")
    (folder / _FILE).unlink()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, part in halves.items():
        write_safetensors(folder / file, {name: tensors[name] for name in part})
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    places = {name: file for file, part in halves.items() for name in part}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert validate(folder).tensors == len(names)
    return folder, index


def test_an_index_that_does_not_fit_its_files_is_found(sharded: tuple[Path, dict[str, Any]]) -> None:
    folder, index = sharded
    places, file = index["weight_map"], folder / "model.safetensors.index.json"

    def said(changed: dict[str, Any], **metadata: Any) -> str:
        file.write_text(json.dumps({"metadata": index["metadata"] | metadata, "weight_map": changed}))
        return faults(folder)

    moved = next(name for name, where in places.items() if where == "model-1.safetensors")
    wrong = said(places | {moved: "model-2.safetensors"})
    assert f"model-2.safetensors: lacks `{moved}`, which the index promises" in wrong
    assert f"has `{moved}`, and the index says that it is in model-2.safetensors" in wrong
    assert "and the index does not name it" in said({name: where for name, where in places.items() if name != moved})
    assert "model-1.safetensors: does not belong here, and would be loaded" in said(
        {name: where for name, where in places.items() if where == "model-2.safetensors"}
    )
    assert "names `../other.safetensors`, which lies outside" in said(places | {"x": "../other.safetensors"})
    assert "says 1 bytes of tensors where there are" in said(places, total_size=1)
    assert "has no `weight_map`" in said({"x": 1})
    file.write_text("{")
    assert "model.safetensors.index.json: is not JSON" in faults(folder)


def test_missing_and_stray_files_are_found(sharded: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = sharded
    (folder / "model-2.safetensors").rename(folder / "model-3.safetensors")
    said = faults(folder)
    assert "model-3.safetensors: does not belong here" in said
    assert "model-2.safetensors: " in said
    (folder / "model-3.safetensors").rename(folder / "model-2.safetensors")
    shutil.copyfile(folder / "model-2.safetensors", folder / _FILE)
    assert "model.safetensors.index.json: lies beside `model.safetensors`" in faults(folder)


def test_a_split_that_the_model_does_not_have_is_found(copied: Any, tmp_path: Path) -> None:
    folder, _ = copied("w4")
    folder.rename(tmp_path / "model")
    for ranks, message in (
        (1, None),
        (2, None),
        (4, "which groups of 32 do not divide"),
        (3, "cannot be split over 3"),
    ):
        (tmp_path / "engine.json").write_text(json.dumps({"tensor_parallel": ranks, "pipeline_parallel": 1}))
        if message is None:
            validate(tmp_path)
            continue
        with pytest.raises(CorruptError, match=message):
            validate(tmp_path)


@pytest.mark.parametrize("value", [True, "x", [1], {"a": 1}, 10**30], ids=str)
@pytest.mark.parametrize(
    ("file", "path", "key"),
    [
        ("config.json", [], "num_hidden_layers"),
        ("config.json", [], "rms_norm_eps"),
        ("config.json", [], "quantization_config"),
        (QUANTIZATION, [], "quantization"),
        (QUANTIZATION, ["quantization"], "exclude_modules"),
        ("tokenizer.json", [], "added_tokens"),
    ],
)
def test_a_value_of_another_type_is_no_traceback(
    copied: Any, file: str, path: list[str], key: str, value: object
) -> None:
    folder, _ = copied("fp8")
    edit(folder / file, path, **{key: value})
    if key == "rms_norm_eps" and isinstance(value, int):
        validate(folder)  # a number, if an odd one
    else:
        assert f"{file}: " in faults(folder)
