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
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_tensorrt_llm_checkpoint
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
    with torch.no_grad():
        export_tensorrt_llm_checkpoint(
            model,
            _DECODERS[case.model_type],
            getattr(torch, case.dtype),
            out,
            inference_tensor_parallel=case.tensor_parallel,  # 0, the default, writes nothing
            inference_pipeline_parallel=case.pipeline_parallel,
        )


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
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The manifest of ModelOpt's checkpoint of every case."""
    found = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        export(case, folder)
        found[name] = modelopt_cases.manifest(folder, digests=case.same_bytes)
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
