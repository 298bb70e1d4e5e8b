"""TensorRT Edge-LLM 0.11 reads our GPTQ, AWQ and ModelOpt files: every weight is the float that we mean.

What it hands to its kernels is asked for, in the loader and in the ONNX file that a device builds from: an INT4 kernel
computes (code - 8) * scale on packed integers, whose places its own packer is asked for. It proves numbers and nothing
else: the last tests hold what it lets through, which our own reader refuses.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmopt.errors import LlmoptError
from llmopt.formats.reading import open_model

pytestmark = pytest.mark.judge

MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
LINEARS = 35
HELD = {
    "gptq": ("--method", "gptq", "--format", "gptq"),
    "gptq, columns out of order": ("--method", "gptq", "--act-order", "--format", "gptq"),
    "gptq, groups of 32": ("--method", "rtn", "--group-size", "32", "--format", "gptq"),
    "awq": ("--method", "awq", "--symmetric", "--format", "awq"),
    "awq, groups of 64": ("--method", "rtn", "--symmetric", "--group-size", "64", "--format", "awq"),
    "modelopt int4": ("--method", "gptq", "--format", "modelopt"),
    "modelopt int4, scaled inputs": ("--method", "awq", "--symmetric", "--format", "modelopt"),
    "modelopt int8": ("--method", "smoothquant", "--activations", "static", "--format", "modelopt"),
    "modelopt fp8": ("--method", "fp8", "--weights", "tensor", "--activations", "static", "--format", "modelopt"),
}
ZERO_POINTS = {
    "gptq": ("--method", "gptq", "--asymmetric", "--format", "gptq"),
    "awq": ("--method", "awq", "--format", "awq"),
}
REFUSED = {
    "int8": ("--method", "rtn", "--bits", "8", "--format", "gptq"),
    "int3": ("--method", "rtn", "--bits", "3", "--format", "gptq"),
    "one scale a row": ("--method", "rtn", "--group-size", "-1", "--format", "gptq"),
}


def quantized(store: Path, *arguments: str) -> Path:
    """What `llmopt quantize` of the working tree makes of the demo model."""
    command = ("quantize", str(MODEL), *arguments, "--samples", "4", "--seq-len", "128", "--store", str(store))
    ran = subprocess.run(
        [sys.executable, "-m", "llmopt", *command, "--json", "--quiet"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return Path(json.loads(ran.stdout)["path"])


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model rounded to nearest, as GPTQ."""
    return quantized(tmp_path_factory.mktemp("store"), "--method", "rtn", "--format", "gptq")


def load(folder: Path, plugin: int = 2) -> torch.nn.Module:
    """Edge-LLM's model of `folder`, its INT4 weights laid out for the kernel `plugin` (1 or 2)."""
    from tensorrt_edgellm.model import AutoModel
    from tensorrt_edgellm.models.ops import set_int4_gemm_plugin_version

    set_int4_gemm_plugin_version(plugin)
    return cast("torch.nn.Module", AutoModel.from_pretrained(str(folder)))


def pack(codes_OI: NDArray[np.int16], plugin: int) -> NDArray[np.uint8]:
    from tensorrt_edgellm.checkpoint import repacking

    pack_plugin = repacking.repack_to_cutedsl_fragment if plugin == 2 else repacking._pack_intweights
    return np.ascontiguousarray(pack_plugin(codes_OI)).view(np.uint8).ravel()


@cache
def places(shape: tuple[int, int], plugin: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which weight of [O, I], counted row by row, its packer puts into the low and the high half of every byte.

    It packs 4 bits a weight: so it is given the weight's index in slices of 4 bits.
    """
    count = shape[0] * shape[1]
    index_OI = np.arange(count).reshape(shape)
    low, high = np.zeros(count // 2, np.int64), np.zeros(count // 2, np.int64)
    for shift in range(0, count.bit_length(), 4):
        nibbles = pack((index_OI >> shift & 15).astype(np.int16), plugin).astype(np.int64)
        low |= (nibbles & 15) << shift
        high |= (nibbles >> 4) << shift
    assert np.array_equal(np.sort(np.concatenate([low, high])), np.arange(count))
    return low, high


def unpack(packed: NDArray[np.int8], shape: tuple[int, int], plugin: int) -> NDArray[np.float32]:
    """The codes [O, I] in `packed`, 0 to 15."""
    low, high = places(shape, plugin)
    held = packed.view(np.uint8).ravel()
    codes = np.empty(shape[0] * shape[1], np.float32)
    codes[low], codes[high] = held & 15, held >> 4
    return codes.reshape(shape)


def weight_of(module: torch.nn.Module, plugin: int) -> NDArray[np.float32]:
    """The weights [O, I] that the kernel of `module` multiplies with, the input's columns in their first order."""
    shape = (cast(int, module.out_features), cast(int, module.in_features))
    held = {name: buffer.detach() for name, buffer in module.named_buffers(recurse=False)}
    weight = held["qweight" if "qweight" in held else "weight"]
    scale = held["scales" if "scales" in held else "weight_scale"].float().numpy()
    if "input_scale" in held:  # FP8: a scalar; INT8: one a row
        return weight.float().numpy() * scale.reshape(-1, 1)
    weight_OI = (unpack(weight.numpy(), shape, plugin) - 8) * np.repeat(scale.T, shape[1] // scale.shape[0], axis=1)
    if "int4_act_perm" in held:
        weight_OI[:, held["int4_act_perm"].numpy()] = weight_OI.copy()
    return weight_OI


def linears(model: torch.nn.Module, made: Path) -> Iterator[tuple[str, torch.nn.Module, NDArray[np.float32]]]:
    """Every quantized linear of ours: its name, theirs of that name, our weights [O, I]."""
    source = open_model(made)
    assert source.reader is not None
    modules = dict(model.named_modules())
    for prefix in sorted({name.rpartition(".")[0] for name in source.checkpoint.tensors if name.endswith(KEYS)}):
        shape = (cast(int, modules[prefix].out_features), cast(int, modules[prefix].in_features))
        ours = source.reader.linear(prefix, shape)
        assert ours is not None
        yield prefix, modules[prefix], ours.dequantize()


KEYS = (".qweight", ".weight_scale")


@pytest.mark.parametrize("name", HELD)
def test_edge_llm_holds_our_weights(name: str, tmp_path: Path) -> None:
    made = quantized(tmp_path / "store", *HELD[name])
    for plugin in (1, 2):
        compared = 0
        for prefix, module, ours_OI in linears(load(made, plugin), made):
            assert np.array_equal(weight_of(module, plugin), ours_OI), (prefix, plugin)
            compared += 1
        assert compared == LINEARS


def export(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Its command `tensorrt-edgellm-export`."""
    call = "from tensorrt_edgellm.scripts.export import main; main()"
    return subprocess.run([sys.executable, "-c", call, str(folder), str(out)], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "awq", "modelopt int4"])
def test_the_onnx_file_that_a_device_builds_from_holds_our_weights(name: str, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    made = quantized(tmp_path / "store", *HELD[name])
    ran = export(made, tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    graph = onnx.load(str(tmp_path / "out" / "llm" / "model.onnx")).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kernels = {node.input[1]: node for node in graph.node if node.op_type == "Int4GroupwiseGemmPluginV2"}
    compared = 0
    for prefix, _, ours_OI in linears(load(made), made):
        (weight,) = [key for key in kernels if f".{prefix}." in key]
        scale_GO = held[kernels[weight].input[2]].astype(np.float32)
        sizes = {attribute.name: attribute.i for attribute in kernels[weight].attribute}
        assert (sizes["gemm_n"], sizes["gemm_k"]) == ours_OI.shape
        codes_OI = unpack(held[weight], ours_OI.shape, 2)
        assert np.array_equal((codes_OI - 8) * np.repeat(scale_GO.T, sizes["group_size"], axis=1), ours_OI), prefix
        compared += 1
    assert compared == LINEARS == len(kernels)


@pytest.mark.parametrize("name", ZERO_POINTS)
def test_zero_points_reach_its_kernels_clipped(name: str, tmp_path: Path) -> None:
    """Its kernels have no zero points: codes are moved to a middle of 8 and clipped to 4 bits, without a word."""
    made = quantized(tmp_path / "store", *ZERO_POINTS[name])
    source = open_model(made)
    assert source.reader is not None
    clipped = 0
    for prefix, module, ours_OI in linears(load(made, plugin=1), made):
        held = {key: buffer.numpy() for key, buffer in module.named_buffers(recurse=False)}
        scale_GO = held["scales"].astype(np.float32)
        scale_OI = np.repeat(scale_GO.T, ours_OI.shape[1] // scale_GO.shape[0], axis=1)
        expected_OI = np.clip(ours_OI / scale_OI, -8, 7).round() * scale_OI
        assert np.array_equal(weight_of(module, 1), expected_OI), prefix
        clipped += int((expected_OI != ours_OI).sum())
    assert clipped > 10_000


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_its_kernels_lack(name: str, tmp_path: Path) -> None:
    made = quantized(tmp_path / "store", *REFUSED[name])
    with pytest.raises(RuntimeError):
        load(made, plugin=1)


def test_compressed_tensors_load_as_memory_that_nothing_filled(tmp_path: Path) -> None:
    """Its loader passes over `weight_packed`: the linears stay as allocated, and nothing says so."""
    made = quantized(tmp_path / "store", "--method", "rtn")
    source = open_model(made)
    assert source.reader is not None
    module = load(made).get_submodule("model.layers.0.mlp.down_proj")
    ours = source.reader.linear("model.layers.0.mlp.down_proj", tuple(module.weight.shape))
    assert ours is not None
    assert type(module).__name__ == "FP16Linear"
    assert not np.allclose(module.weight.numpy().astype(np.float32), ours.dequantize(), atol=1e-2)


Tensors = dict[str, torch.Tensor]
SITE = "model.layers.1.mlp.down_proj."


def _renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return damage


def _without(*prefixes: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(prefixes)]:
            del tensors[name]

    return damage


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return damage


LET_THROUGH = {
    "scales missing": _without(SITE + "scales"),
    "codes missing": _without(SITE + "qweight"),
    "codes misnamed": _renamed(SITE + "qweight", SITE + "q_weight"),
    "zero points missing": _without(SITE + "qzeros"),
    "a linear missing": _without(SITE),
    "a norm missing": _without("model.layers.1.input_layernorm.weight"),
    "the embedding missing": _without("model.embed_tokens.weight"),
    "a layer missing": _without("model.layers.4."),
    "scales transposed": _changed(SITE + "scales", lambda scale: scale.T),
    "a row of scales missing": _changed(SITE + "scales", lambda scale: scale[:-1]),
    "codes in 64 bits": _changed(SITE + "qweight", torch.Tensor.long),
    "codes as floats": _changed(SITE + "qweight", torch.Tensor.float),
}


@pytest.mark.parametrize("name", LET_THROUGH)
def test_what_it_lets_through_our_reader_refuses(name: str, rounded: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = shutil.copytree(rounded, tmp_path / "damaged", copy_function=shutil.copyfile)
    tensors: Tensors = {}
    for shard in sorted(damaged.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (damaged / "model.safetensors.index.json").unlink(missing_ok=True)
    LET_THROUGH[name](tensors)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    load(damaged, plugin=1)
    with pytest.raises(LlmoptError):
        open_model(damaged)
