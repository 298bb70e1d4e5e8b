"""GPTQModel, and transformers with optimum, read our GPTQ and AWQ files: every weight is the float that we mean.

Their kernels hold F16, in which the product of an integer and a scale is rounded: ours is rounded once, as theirs is.
Kernels are asked for their weights and not run, since the first run compiles C++ for minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with its own count it fails on machines of few cores

import pytest
import torch

from llmopt.formats.reading import Source, open_model

pytestmark = pytest.mark.judge

MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
GPTQ = {
    "int4": ("--method", "gptq"),
    "int4, zero points": ("--method", "gptq", "--asymmetric"),
    "int4, one scale a row": ("--method", "rtn", "--group-size", "-1"),
    "int8": ("--method", "rtn", "--bits", "8"),
    "int3": ("--method", "rtn", "--bits", "3"),
    "int2": ("--method", "rtn", "--bits", "2", "--group-size", "32"),
}
AWQ = {"zero points": ("--method", "awq"), "symmetric": ("--method", "awq", "--symmetric")}


def quantized(store: Path, *arguments: str) -> Path:
    """What `llmopt quantize` of the working tree makes of the demo model."""
    command = ("quantize", str(MODEL), *arguments, "--samples", "8", "--seq-len", "256", "--store", str(store))
    ran = subprocess.run(
        [sys.executable, "-m", "llmopt", *command, "--json", "--quiet"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return Path(json.loads(ran.stdout)["path"])


def called_its_own(made: Path, out: Path) -> Path:
    """A copy that says GPTQModel made it: of zero points in `checkpoint_format: gptq` it believes only its own."""
    shutil.copytree(made, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def check(model: torch.nn.Module, made: Path, weight_of: Callable[[torch.nn.Module], torch.Tensor]) -> None:
    """Every quantized linear of ours is one of theirs and holds the same numbers, to the bit of F16."""
    source: Source = open_model(made)
    assert source.reader is not None
    modules, compared = dict(model.named_modules()), 0
    for prefix in sorted({name.rpartition(".")[0] for name in source.checkpoint.tensors if name.endswith(".qweight")}):
        module = modules[prefix]
        theirs_OI = weight_of(module).T
        ours = source.reader.linear(prefix, tuple(theirs_OI.shape))
        assert ours is not None
        assert torch.equal(theirs_OI, torch.from_numpy(ours.dequantize()).half()), prefix
        compared += 1
    assert compared == 35


def gptq_weight(module: torch.nn.Module) -> torch.Tensor:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    assert isinstance(module, TorchLinear)
    with torch.compiler.set_stance("force_eager"):
        return module.dequantize_weight()


def awq_weight(module: torch.nn.Module) -> torch.Tensor:
    from gptqmodel.nn_modules.qlinear import AWQuantLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    assert isinstance(module, AWQuantLinear)
    return dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size)


@pytest.mark.parametrize("name", GPTQ)
def test_gptqmodel_holds_our_gptq_weights(name: str, tmp_path: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel

    made = quantized(tmp_path / "store", *GPTQ[name], "--format", "gptq")
    if "zero points" in name:
        made = called_its_own(made, tmp_path / "signed")
    loaded = GPTQModel.load(str(made), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    check(loaded.model, made, gptq_weight)


@pytest.mark.parametrize("name", AWQ)
def test_gptqmodel_holds_our_awq_weights(name: str, tmp_path: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel

    made = quantized(tmp_path / "store", *AWQ[name], "--format", "awq")
    loaded = GPTQModel.load(str(made), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    check(loaded.model, made, awq_weight)


def test_transformers_with_optimum_holds_our_gptq_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPTQConfig

    made = quantized(tmp_path / "store", *GPTQ["int4"], "--format", "gptq")
    kernel = GPTQConfig(bits=4, backend="torch")
    loaded = AutoModelForCausalLM.from_pretrained(
        made, device_map="cpu", dtype=torch.float16, quantization_config=kernel
    )
    check(loaded, made, gptq_weight)
