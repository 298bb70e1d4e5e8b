"""Merged tensors against the algebra written out, on adapters made by hand. peft's own word is in tests/judges."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmopt.errors import LlmoptError
from llmopt.models.adapter import open_checkpoint
from llmopt.models.checkpoint import Checkpoint, float32_to_bfloat16

QUERY = "model.layers.0.self_attn.q_proj"
MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="module")
def base(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen2", dtype="float32", tie_word_embeddings=False)


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """make_adapter({"<module>.lora_A.weight": array, ...}, r=4, ...) -> folder."""

    def make(tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        wrapped = {f"base_model.model.{n}": np.ascontiguousarray(t, np.float32) for n, t in tensors.items()}
        save_file(wrapped, folder / "adapter_model.safetensors")
        values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
        (folder / "adapter_config.json").write_text(json.dumps(values))
        return folder

    return make


def factors(module: str, out: int, in_: int, rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        f"{module}.lora_A.weight": random.normal(size=(rank, in_)).astype(np.float32),
        f"{module}.lora_B.weight": random.normal(size=(out, rank)).astype(np.float32),
    }


def product(tensors: Mapping[str, np.ndarray], module: str) -> np.ndarray:
    """B @ A in float64."""
    up, down = tensors[f"{module}.lora_B.weight"], tensors[f"{module}.lora_A.weight"]
    return up.astype(np.float64) @ down.astype(np.float64)


def merged(base: Path, adapter: Path, name: str) -> np.ndarray:
    return open_checkpoint(base, adapter).float_array(name)


def plain(base: Path, name: str) -> np.ndarray:
    return Checkpoint.open(base).float_array(name)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * float(np.abs(expected).max()))


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({}, 4, 2.0),
        ({"lora_alpha": 1}, 4, 0.25),
        ({"use_rslora": True}, 4, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 12}}, 4, 3.0),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 12}}, 4, 2.0),
        ({"alpha_pattern": {"proj": 12}}, 4, 2.0),
        ({"rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2}}, 2, 4.0),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 6}, "use_rslora": True}, 2, 6 / 2**0.5),
    ],
)
def test_a_weight_gets_the_scaled_product(
    base: Path, make_adapter: MakeAdapter, config: dict[str, Any], rank: int, scale: float
) -> None:
    tensors = factors(QUERY, 128, 128, rank)
    expected = plain(base, f"{QUERY}.weight") + scale * product(tensors, QUERY)
    close(merged(base, make_adapter(tensors, **config), f"{QUERY}.weight"), expected)


def test_only_what_the_adapter_names_changes(base: Path, make_adapter: MakeAdapter) -> None:
    adapted, before = open_checkpoint(base, make_adapter(factors(QUERY, 128, 128))), Checkpoint.open(base)
    assert adapted.tensors == before.tensors
    changed = [n for n in before.tensors if not np.array_equal(adapted.float_array(n), before.float_array(n))]
    assert changed == [f"{QUERY}.weight"]


def test_a_transposed_weight_gets_the_transposed_product(base: Path, make_adapter: MakeAdapter) -> None:
    name = "model.layers.0.mlp.up_proj"  # [256, 128], read as in x out
    tensors = factors(name, 128, 256)
    expected = plain(base, f"{name}.weight") + 2 * product(tensors, name).T
    close(merged(base, make_adapter(tensors, fan_in_fan_out=True), f"{name}.weight"), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_gives_every_output_its_magnitude(base: Path, make_adapter: MakeAdapter, transposed: bool) -> None:
    name = "model.layers.1.mlp.down_proj"  # [128, 256]
    out, in_ = (256, 128) if transposed else (128, 256)
    tensors = factors(name, out, in_)
    magnitude = np.linspace(0.5, 2, out, dtype=np.float32)
    adapter = make_adapter(
        tensors | {f"{name}.lora_magnitude_vector": magnitude}, use_dora=True, fan_in_fan_out=transposed
    )
    found = merged(base, adapter, f"{name}.weight")
    weight = plain(base, f"{name}.weight").astype(np.float64)
    direction = (weight.T if transposed else weight) + 2 * product(tensors, name)
    expected = magnitude[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    close(found.T if transposed else found, expected)


def test_an_embedding_gets_the_transposed_product(base: Path, make_adapter: MakeAdapter) -> None:
    random = np.random.default_rng(0)
    down, up = random.normal(size=(4, 320)), random.normal(size=(128, 4))
    name = "model.embed_tokens"
    adapter = make_adapter({f"{name}.lora_embedding_A": down, f"{name}.lora_embedding_B": up})
    close(merged(base, adapter, f"{name}.weight"), plain(base, f"{name}.weight") + 2 * (up @ down).T)


def test_a_module_that_was_saved_takes_the_place_of_the_base(base: Path, make_adapter: MakeAdapter) -> None:
    norm = np.linspace(0, 1, 128, dtype=np.float32)
    bias = np.linspace(1, 2, 128, dtype=np.float32)
    adapter = make_adapter({"model.norm.weight": norm, f"{QUERY}.base_layer.bias": bias}, bias="all")
    assert np.array_equal(merged(base, adapter, "model.norm.weight"), norm)
    assert np.array_equal(merged(base, adapter, f"{QUERY}.bias"), bias)


def test_a_saved_base_and_its_factors_are_both_taken(base: Path, make_adapter: MakeAdapter) -> None:
    tensors = factors(QUERY, 128, 128)
    whole = np.random.default_rng(5).normal(size=(128, 128)).astype(np.float32)
    adapter = make_adapter(tensors | {f"{QUERY}.base_layer.weight": whole})
    close(merged(base, adapter, f"{QUERY}.weight"), whole + 2 * product(tensors, QUERY))


def test_a_bias_of_the_factors_is_scaled_too(base: Path, make_adapter: MakeAdapter) -> None:
    bias = np.linspace(-1, 1, 128, dtype=np.float32)
    adapter = make_adapter(factors(QUERY, 128, 128) | {f"{QUERY}.lora_B.bias": bias}, lora_bias=True)
    close(merged(base, adapter, f"{QUERY}.bias"), plain(base, f"{QUERY}.bias") + 2 * bias)


def test_a_bfloat16_base_is_merged_before_it_is_rounded(
    make_checkpoint: Callable[..., Path], make_adapter: MakeAdapter
) -> None:
    import torch

    base = make_checkpoint("llama", dtype="bfloat16")
    adapted = open_checkpoint(base, make_adapter(factors(QUERY, 128, 128)))
    values = adapted.float_array(f"{QUERY}.weight")
    assert np.array_equal(adapted.array(f"{QUERY}.weight"), float32_to_bfloat16(values))
    assert torch.equal(adapted.tensor(f"{QUERY}.weight"), torch.from_numpy(values).to(torch.bfloat16))
    assert not np.array_equal(adapted.tensor(f"{QUERY}.weight").float().numpy(), values)


def test_a_checkpoint_without_the_models_prefix_is_still_found(base: Path, make_adapter: MakeAdapter) -> None:
    tensors = factors(f"wrapper.{QUERY}", 128, 128)
    close(
        merged(base, make_adapter(tensors), f"{QUERY}.weight"),
        plain(base, f"{QUERY}.weight") + 2 * product(tensors, f"wrapper.{QUERY}"),
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "type `IA3`"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: loftq"),
        ({"use_qalora": True}, "`use_qalora: True`"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "`target_parameters: "),
        ({"layer_replication": [[0, 1], [0, 2]]}, "`layer_replication: "),
        ({"alora_invocation_tokens": [1, 2]}, "`alora_invocation_tokens: "),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices: "),
        ({"something_new": {"a": 1}}, "`something_new: "),
        ({"r": 8}, "has the rank 4, where `adapter_config.json` says 8"),
        ({"r": "four"}, "no usable `r`"),
        ({"lora_alpha": 0}, "no usable `lora_alpha`"),
    ],
)
def test_what_would_not_be_merged_as_trained_is_refused(
    base: Path, make_adapter: MakeAdapter, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(LlmoptError) as caught:
        open_checkpoint(base, make_adapter(factors(QUERY, 128, 128), **config))
    assert message in caught.value.message


def test_what_was_only_of_the_training_is_not(base: Path, make_adapter: MakeAdapter) -> None:
    config = {
        "target_parameters": None, "layer_replication": None, "lora_dropout": 0.1, "eva_config": {"rho": 2.0},
        "megatron_core": "megatron.core", "loftq_config": {}, "layers_to_transform": [0], "init_lora_weights": "eva",
    }  # fmt: skip
    adapter = make_adapter(factors(QUERY, 128, 128), **config)
    assert not np.array_equal(merged(base, adapter, f"{QUERY}.weight"), plain(base, f"{QUERY}.weight"))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.7.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
        "score.weight",
    ],
)
def test_a_tensor_without_a_place_is_named(base: Path, make_adapter: MakeAdapter, name: str) -> None:
    tensors = factors(QUERY, 128, 128) | {name: np.zeros((4, 128), np.float32)}
    if name.endswith("lora_A.weight"):
        tensors[name.replace("_A", "_B")] = np.zeros((128, 4), np.float32)
    with pytest.raises(LlmoptError, match="has no place in the model") as caught:
        open_checkpoint(base, make_adapter(tensors))
    assert f"`base_model.model.{name}`" in caught.value.message


def test_a_missing_factor_is_named(base: Path, make_adapter: MakeAdapter) -> None:
    tensors = factors(QUERY, 128, 128)
    del tensors[f"{QUERY}.lora_B.weight"]
    with pytest.raises(LlmoptError, match=r"lora_A.weight`, but not both factors"):
        open_checkpoint(base, make_adapter(tensors))


def test_an_adapter_of_another_size_is_refused(base: Path, make_adapter: MakeAdapter) -> None:
    with pytest.raises(LlmoptError, match=r"lora_B.weight` of the adapter is \[64, 4\] in F32") as caught:
        open_checkpoint(base, make_adapter(factors(QUERY, 64, 128)))
    assert "[128, 4]" in caught.value.message


def test_an_embedding_that_is_tied_is_not_changed(tiny: Path, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter({"model.embed_tokens.weight": np.zeros((320, 128), np.float32)})
    with pytest.raises(LlmoptError, match="ties to its output layer"):
        open_checkpoint(tiny, adapter)


def test_a_bias_needs_one_to_be_added_to(make_checkpoint: Callable[..., Path], make_adapter: MakeAdapter) -> None:
    tensors = factors(QUERY, 128, 128) | {f"{QUERY}.lora_B.bias": np.zeros(128, np.float32)}
    with pytest.raises(LlmoptError, match=r"lora_B.bias` of the adapter has no place"):
        open_checkpoint(make_checkpoint("llama", tie_word_embeddings=False), make_adapter(tensors, lora_bias=True))


def test_a_quantized_model_takes_no_adapter(base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "quantized"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(LlmoptError, match="is quantized"):
        open_checkpoint(folder, make_adapter(factors(QUERY, 128, 128)))


def test_quantizing_with_an_adapter_is_quantizing_what_it_merges_to(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """A float32 base, so that saving the merged model loses nothing."""
    from llmopt import quantizers
    from llmopt.artifacts.outcome import silent

    adapter = make_adapter(factors(QUERY, 128, 128) | factors("model.layers.1.mlp.down_proj", 128, 256, seed=1))
    adapted = open_checkpoint(base, adapter)
    twin = Path(shutil.copytree(base, tmp_path / "merged"))
    save_file(
        {name: adapted.float_array(name) for name in load_file(base / "model.safetensors")},
        twin / "model.safetensors",
        metadata={"format": "pt"},
    )
    settings = quantizers.resolve({"method": "rtn", "group_size": 32})
    for source, merge, out in ((base, adapter, tmp_path / "a"), (twin, None, tmp_path / "b")):
        quantizers.check(source, settings, None, adapter=merge)
        out.mkdir()
        quantizers.quantize(source, settings, None, out, silent, adapter=merge)
    a, b = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir() if f.is_file()} for name in "ab")
    assert a == b
    assert "config.json" in a


def test_an_adapter_that_is_not_finite_is_found_before_work(base: Path, make_adapter: MakeAdapter) -> None:
    from llmopt import quantizers

    tensors = factors(QUERY, 128, 128)
    tensors[f"{QUERY}.lora_A.weight"][0, 0] = np.nan
    with pytest.raises(LlmoptError, match=r"lora_A.weight` holds values that are not finite"):
        quantizers.check(base, quantizers.resolve({"method": "rtn"}), None, adapter=make_adapter(tensors))


def test_opening_loads_no_torch(base: Path, make_adapter: MakeAdapter) -> None:
    import subprocess
    import sys

    adapter = make_adapter(factors(QUERY, 128, 128))
    code = (
        "import sys\nfrom pathlib import Path\nfrom llmopt import quantizers\n"
        "quantizers.check(Path(sys.argv[1]), quantizers.resolve({'method': 'rtn'}), None, adapter=Path(sys.argv[2]))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(base), str(adapter)], timeout=60).returncode == 0


def test_products_in_bfloat16_do_not_touch_the_merge(base: Path, make_adapter: MakeAdapter) -> None:
    """The driver may switch float32 products to BF16 factors, for the whole process."""
    import torch

    adapter = make_adapter(factors(QUERY, 128, 128))
    exact = merged(base, adapter, f"{QUERY}.weight")
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        assert np.array_equal(merged(base, adapter, f"{QUERY}.weight"), exact)
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize("rank", [1, 7, 64])
def test_the_number_of_threads_changes_no_bit(base: Path, make_adapter: MakeAdapter, rank: int) -> None:
    import torch

    adapter = make_adapter(factors("model.layers.0.mlp.up_proj", 256, 128, rank), r=rank)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(merged(base, adapter, "model.layers.0.mlp.up_proj.weight"))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
