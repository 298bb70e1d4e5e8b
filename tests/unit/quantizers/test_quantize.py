"""Whole checkpoints through the driver; transformers, loading what we wrote, is the judge."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmopt import calibrate, evaluate, quantizers
from llmopt.artifacts.outcome import Outcome, silent
from llmopt.errors import LlmoptError, SettingsError
from llmopt.formats.reading import open_quantized
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig
from llmopt.models.parallel import Workers
from llmopt.quantizers import driver as driver_module
from llmopt.quantizers import preflight

SMALL = {"samples": 8, "seq_len": 64}
W8A8 = {"bits": 8, "group_size": -1}


def quantize(model: Path, text: Path, out: Path, **settings: Any) -> Outcome:
    resolved = quantizers.resolve({**SMALL, **settings})
    ids = calibration_set(model, text, out.with_name(f"{out.name}-ids"), resolved)
    quantizers.check(model, resolved, ids)
    out.mkdir(parents=True)
    return quantizers.quantize(model, resolved, ids, out, silent)


def calibration_set(model: Path, text: Path, folder: Path, settings: quantizers.QuantizeSettings) -> Path:
    """What `llmopt quantize` makes of a text before it quantizes."""
    common = settings.common
    return calibrate.from_text(model, text, folder, samples=common.samples, seq_len=common.seq_len, seed=common.seed)


def digest(folder: Path) -> str:
    files = sorted(f for f in folder.iterdir() if f.is_file())
    return hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()


def dequantized_twin(folder: Path, base: Path, out: Path) -> Path:
    """A plain float32 checkpoint with the weights that the quantized one stands for."""
    checkpoint = Checkpoint.open(folder)
    config, reader = DecoderConfig.read(checkpoint), open_quantized(checkpoint)
    assert reader is not None
    tensors = {n: checkpoint.tensor(n).float() for n in checkpoint.tensors if n.endswith(("norm.weight", ".bias"))}
    tensors["model.embed_tokens.weight"] = checkpoint.tensor("model.embed_tokens.weight").float()
    if not config.tie_embeddings:
        head = reader.linear("lm_head", (config.vocab_size, config.hidden_size))
        tensors["lm_head.weight"] = (
            checkpoint.tensor("lm_head.weight").float() if head is None else torch.from_numpy(head.dequantize())
        )
    for index in range(config.layers):
        for name, shape in config.linear_shapes(index).items():
            prefix = f"{config.block(index)}.{name}"
            weight = reader.linear(prefix, shape)
            assert weight is not None
            tensors[f"{prefix}.weight"] = torch.from_numpy(weight.dequantize())
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(base / "config.json", out / "config.json")
    return out


def logits(folder: Path) -> torch.Tensor:
    ids = torch.randint(0, 320, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"method": "rtn"}),
        ("llama", {"method": "gptq"}),
        ("mistral", {"method": "gptq", "act_order": False, "group_size": 32}),
        ("qwen2", {"method": "gptq", "bits": 3, "group_size": -1}),
        ("qwen3", {"method": "awq", "symmetric": True}),
        ("qwen3", {"method": "gptq", "lm_head": True, "bits": 8}),
    ],
)
def test_transformers_computes_the_dequantized_logits(
    make_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    base = make_checkpoint(model_type)
    quantize(base, text, tmp_path / "q", **settings)
    twin = dequantized_twin(tmp_path / "q", base, tmp_path / "twin")
    assert apart(logits(tmp_path / "q"), logits(twin)) < 1e-5


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_transformers_computes_our_int8_logits(
    make_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, activations: str
) -> None:
    """Float rounding tips some activations to the next of 256 steps, so this is as close as two programs get."""
    base = make_checkpoint("qwen2")
    quantize(base, text, tmp_path / "q", method="smoothquant", activations=activations)
    twin = dequantized_twin(tmp_path / "q", base, tmp_path / "twin")
    ours = evaluate.evaluate(
        tmp_path / "q", base, text, evaluate.resolve({"windows": 2, "seq_len": 48}), tmp_path, silent
    )
    assert apart(logits(tmp_path / "q"), logits(twin)) < 0.1
    assert ours.metrics["top1_agreement"] > 0.9  # type: ignore[operator]


@pytest.mark.filterwarnings("default", "ignore:You passed `quantization_config`:UserWarning")
def test_transformers_reads_our_zero_points(tiny: Path, text: Path, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    quantize(tiny, text, tmp_path / "q", method="awq")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    twin = load_file(dequantized_twin(tmp_path / "q", tiny, tmp_path / "twin") / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    # compressed-tensors dequantizes in the scale's dtype, BF16 here.
    assert torch.equal(dict(model.named_parameters())[name], twin[name].bfloat16().float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_three_formats_hold_the_same_weights(tiny: Path, text: Path, tmp_path: Path, symmetric: bool) -> None:
    twins = []
    for name in ("compressed-tensors", "gptq", "awq"):
        quantize(tiny, text, tmp_path / name, method="gptq", symmetric=symmetric, group_size=32, format=name)
        twins.append(dequantized_twin(tmp_path / name, tiny, tmp_path / f"{name}-twin") / "model.safetensors")
    assert len({hashlib.sha256(t.read_bytes()).hexdigest() for t in twins}) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rtn"},
        {"method": "gptq"},
        {"method": "gptq", "compensate": False, "sweeps": 0},
        {"method": "gptq", "scaling": "awq"},
        {"method": "awq"},
        {"method": "smoothquant"},
        {"method": "smoothquant", "activations": "static"},
    ],
)
def test_bytes_do_not_depend_on_the_number_of_cores(
    make_checkpoint: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver_module, "BATCH_TOKENS", 128)
    monkeypatch.setattr(driver_module, "ROWS", 48)
    model = make_checkpoint("llama")
    digests = set()
    for cores in (1, 2, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        quantize(model, text, tmp_path / str(cores), **settings)
        digests.add(digest(tmp_path / str(cores)))
    assert len(digests) == 1


def test_another_seed_gives_other_bytes(tiny: Path, text: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        quantize(tiny, text, tmp_path / str(seed), seed=seed)
    assert digest(tmp_path / "0") != digest(tmp_path / "1")


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_folding_scales_changes_no_logits(
    make_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, model_type: str, method: str
) -> None:
    """Scale every site of a block as the method does, but round nothing: the block must compute what it did."""
    model = make_checkpoint(model_type, dtype="float32")
    checkpoint = Checkpoint.open(model)
    config = DecoderConfig.read(checkpoint)
    settings = quantizers.resolve({"method": method, **SMALL})
    ids = calibration_set(model, text, tmp_path / "ids", settings)
    tokens = preflight.calibration_windows(settings, config, ids)
    with torch.no_grad(), Workers() as workers:
        driver = driver_module.Driver(checkpoint, config, settings, tokens, workers, silent, quantizers.Execution())
        block = driver_module.load_block(checkpoint, config, None, 0)
        shelf, tables = driver._embed(tmp_path), driver_module.position_tables(config, 64)
        x = shelf.get(0).ours.residual_BTH
        before, weights = block.forward(x, tables), {n: t.clone() for n, t in block.tensors.items()}
        seen = driver._observe(block, shelf, driver._scaler, driver_module._Part())  # type: ignore[arg-type]
        for site in config.sites(0):
            driver._scale_site(block, site, seen[site.name], driver._scaler)  # type: ignore[arg-type]
        changed = [name for name, tensor in block.tensors.items() if not torch.equal(tensor, weights[name])]
        assert "input_layernorm.weight" in changed
        assert apart(block.forward(x, tables), before) < 1e-5


def test_gptq_is_nearer_to_the_base_than_rounding(tiny: Path, text: Path, tmp_path: Path) -> None:
    figures = {}
    for method in ("rtn", "gptq"):
        quantize(tiny, text, tmp_path / method, method=method, samples=32)
        settings = evaluate.resolve({"windows": 8, "seq_len": 64})
        figures[method] = evaluate.evaluate(tmp_path / method, tiny, text, settings, tmp_path, silent).metrics
    assert figures["gptq"]["kl_mean"] < figures["rtn"]["kl_mean"]  # type: ignore[operator]


def test_compensating_keeps_the_model_nearer(tiny: Path, text: Path, tmp_path: Path) -> None:
    figures = {}
    for compensate in (True, False):
        out = tmp_path / str(compensate)
        quantize(tiny, text, out, compensate=compensate, samples=64, bits=3)
        settings = evaluate.resolve({"windows": 16, "seq_len": 64})
        figures[compensate] = evaluate.evaluate(out, tiny, text, settings, tmp_path, silent).metrics["kl_mean"]
    assert figures[True] < figures[False]  # type: ignore[operator]


def test_what_is_not_quantized_is_passed_through(tiny: Path, text: Path, tmp_path: Path) -> None:
    quantize(tiny, text, tmp_path / "q")
    base, written = load_file(tiny / "model.safetensors"), Checkpoint.open(tmp_path / "q")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(written.tensor(name), base[name])
    assert (tmp_path / "q" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_every_block_is_a_shard_of_its_own(tiny: Path, text: Path, tmp_path: Path) -> None:
    quantize(tiny, text, tmp_path / "q")
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())["weight_map"]
    for block in range(2):
        assert len({file for name, file in index.items() if name.startswith(f"model.layers.{block}.")}) == 1


def test_a_fallback_is_an_event(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmopt.quantizers.methods.factorize", lambda *args, **kwargs: None)
    outcome = quantize(tiny, text, tmp_path / "q")
    assert len(outcome.events) == 2 * 4
    assert "model.layers.0.qkv: rounded to nearest" in outcome.events[0]


def test_a_width_that_the_group_does_not_divide_is_found_before_work(
    make_checkpoint: Callable[..., Path], text: Path
) -> None:
    model = make_checkpoint("llama", intermediate_size=288)
    with pytest.raises(SettingsError, match=r"mlp.down_proj` has 288 in-features") as caught:
        quantizers.check(model, quantizers.resolve({**SMALL}), text)
    assert "`group_size: 32`" in str(caught.value.hint)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_that_are_not_finite_are_found_before_work(
    make_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, bad: float, dtype: str
) -> None:
    folder = Path(shutil.copytree(make_checkpoint("llama", dtype=dtype), tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = bad
    save_file(tensors, folder / "model.safetensors")
    settings = quantizers.resolve({**SMALL})
    ids = calibration_set(folder, text, tmp_path / "ids", settings)
    with pytest.raises(LlmoptError, match=r"`model.layers.1.mlp.down_proj.weight` holds values that are not finite"):
        quantizers.check(folder, settings, ids)


def test_a_sequence_longer_than_the_model_is_refused(tiny: Path, text: Path) -> None:
    with pytest.raises(SettingsError, match="the model has 256 positions"):
        quantizers.check(tiny, quantizers.resolve({"seq_len": 512}), text)


def test_a_quantized_model_is_not_quantized_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    quantize(tiny, text, tmp_path / "q", method="rtn")
    with pytest.raises(LlmoptError, match="quantized already"):
        quantizers.check(tmp_path / "q", quantizers.resolve({**SMALL}), text)


def test_a_pattern_that_matches_nothing_is_found_before_work(tiny: Path, text: Path) -> None:
    settings = quantizers.resolve({**SMALL, "overrides": {"*.down_proj": {"bits": 8}, "down_proj": {"bits": 8}}})
    with pytest.raises(SettingsError, match="no linear of the model matches the pattern `down_proj`") as caught:
        quantizers.check(tiny, settings, text)
    assert "`model.layers.0.self_attn.q_proj`" in str(caught.value.hint)


def test_an_override_of_a_head_that_stays_plain_says_so(make_checkpoint: Callable[..., Path], text: Path) -> None:
    model = make_checkpoint("llama")
    settings = quantizers.resolve({**SMALL, "overrides": {"lm_head": {"bits": 8}}})
    with pytest.raises(SettingsError, match="`lm_head`") as caught:
        quantizers.check(model, settings, text)
    assert "`lm_head: true`" in str(caught.value.hint)


def test_skipping_everything_is_refused(tiny: Path, text: Path) -> None:
    with pytest.raises(SettingsError, match="skips every linear"):
        quantizers.check(tiny, quantizers.resolve({**SMALL, "overrides": {"*": {"skip": True}}}), text)


def test_a_group_size_is_checked_for_the_linears_that_have_it(make_checkpoint: Callable[..., Path], text: Path) -> None:
    model = make_checkpoint("llama", intermediate_size=288)
    fitting = {**SMALL, "overrides": {"*.down_proj": {"group_size": 32}}}
    quantizers.check_model(model, quantizers.resolve(fitting))


def test_a_tied_head_cannot_be_quantized(tiny: Path, text: Path) -> None:
    with pytest.raises(SettingsError, match="ties it"):
        quantizers.check(tiny, quantizers.resolve({**SMALL, "lm_head": True}), text)


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape"])
def test_a_quantized_checkpoint_that_lacks_a_tensor_is_refused(
    tiny: Path, text: Path, tmp_path: Path, suffix: str
) -> None:
    quantize(tiny, text, tmp_path / "q", method="rtn")
    index = tmp_path / "q" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][f"model.layers.1.mlp.up_proj.{suffix}"]
    index.write_text(json.dumps(content))
    with pytest.raises(LlmoptError, match=f"no tensor `model.layers.1.mlp.up_proj.{suffix}`"):
        evaluate.check(tmp_path / "q", None, text, evaluate.resolve({"windows": 2, "seq_len": 48}))
