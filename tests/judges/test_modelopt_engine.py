"""ModelOpt's own TensorRT-LLM checkpoint as the judge of ours, and of the manifests kept of it.

Needs nvidia-modelopt 0.47, whose exporter of this format is announced to go in 0.49; `make bench-judges` runs it in a
venv. LLMOPT_GOLDEN=write writes tests/golden/trt_llm/modelopt-0.47.json again.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt.compilers.trt_llm.validate import validate
from llmopt.errors import CorruptError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden" / "trt_llm"))
import modelopt_cases
from modelopt_cases import CASES, GOLDEN, Case

pytestmark = [
    pytest.mark.judge,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed"),
]

_DECODERS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen"}


def export(case: Case, out: Path) -> None:
    """ModelOpt's checkpoint of a case in `out`."""
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    model = quantized(case)
    with torch.no_grad():
        export_tensorrt_llm_checkpoint(
            model,
            _DECODERS[case.model_type],
            getattr(torch, case.dtype),
            out,
            inference_tensor_parallel=case.tensor_parallel,  # 0, the default, writes nothing
            inference_pipeline_parallel=case.pipeline_parallel,
        )


def quantized(case: Case) -> Any:
    """The model of a case, quantized by ModelOpt."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
    from transformers import AutoConfig, AutoModelForCausalLM

    values = modelopt_cases.config(case)
    architectures = values.pop("architectures")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).to(getattr(torch, case.dtype))
    weights = {name: torch.from_numpy(array) for name, array in modelopt_cases.weights(case).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.config.architectures = architectures  # decides the architecture of the checkpoint
    if case.preset is not None:
        settings = copy.deepcopy(getattr(mtq, case.preset))
        if case.kv_cache:
            settings = update_quant_cfg_with_kv_cache_quant(settings, mtq.FP8_KV_CFG["quant_cfg"])
        torch.manual_seed(0)
        mtq.quantize(model, settings, lambda model: model(torch.randint(0, 320, (4, 64))))
        if case.same_bytes:
            set_scales(model, case)
    return model


def set_scales(model: torch.nn.Module, case: Case) -> None:
    """Scales of activations and of the KV cache as the case has them, whatever the calibration found."""
    scheme = case.scheme
    assert scheme is not None
    for prefix in modelopt_cases.linears():
        if scheme.activations == "static":
            model.get_submodule(prefix).input_quantizer.amax = torch.tensor(modelopt_cases.input_amax(prefix))
    for index, block in enumerate(model.model.layers):
        if case.kv_cache:
            k_scale, v_scale = modelopt_cases.kv_scales(index)
            block.self_attn.k_bmm_quantizer.amax = torch.tensor(k_scale * 448)
            block.self_attn.v_bmm_quantizer.amax = torch.tensor(v_scale * 448)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ModelOpt's checkpoint of every case."""
    found = {}
    for name, case in CASES.items():
        found[name] = tmp_path_factory.mktemp(name)
        export(case, found[name])
    return found


@pytest.fixture(scope="module")
def exported(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Their manifests."""
    found = {name: modelopt_cases.manifest(folder, digests=CASES[name].same_bytes) for name, folder in folders.items()}
    if os.environ.get("LLMOPT_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    return found


@pytest.mark.parametrize("name", CASES)
def test_our_checkpoint_is_what_modelopt_writes(exported: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Every byte where the method only rounds to nearest, else names, shapes, dtypes and config.json."""
    ours = modelopt_cases.manifest(modelopt_cases.write_ours(CASES[name], tmp_path), digests=True)
    assert modelopt_cases.differences(exported[name], ours) == []


@pytest.mark.parametrize("name", CASES)
def test_the_golden_manifest_is_what_modelopt_writes(exported: dict[str, Any], name: str) -> None:
    assert json.loads(GOLDEN.read_text())[name] == exported[name]


@pytest.mark.parametrize("name", CASES)
def test_our_validator_takes_their_checkpoint(folders: dict[str, Path], exported: dict[str, Any], name: str) -> None:
    """Unless a method that it did not search a scale of inputs for would need one: TensorRT-LLM loads none then."""
    case = CASES[name]
    if case.same_bytes and case.algorithm in ("W4A16_AWQ", "W8A8_SQ_PER_CHANNEL"):
        with pytest.raises(CorruptError, match="prequant_scaling_factor` is missing"):
            validate(folders[name])
    else:
        assert validate(folders[name]).tensors == sum(len(rank) for rank in exported[name]["ranks"])


@pytest.mark.parametrize("name", ["llama-bf16", "llama-fp8", "llama-fp8-fp8-cache-pp2", "llama-awq", "qwen2-fp8-tp2"])
def test_our_validator_takes_their_bundle(name: str, tmp_path: Path) -> None:
    """The Hugging Face checkpoint that NVIDIA's own models come as."""
    from modelopt.torch.export import export_hf_checkpoint

    export_hf_checkpoint(quantized(CASES[name]), export_dir=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert validate(tmp_path).tensors > 20
