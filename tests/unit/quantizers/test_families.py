"""Every family through every method; transformers, loading what we wrote, is the judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from llmopt import calibrate, evaluate, quantizers
from llmopt.artifacts.outcome import Outcome, silent
from llmopt.errors import SettingsError
from llmopt.formats.dequantized import load_block, load_head
from llmopt.formats.reading import Source, open_model
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import DecoderBlock, embed, final_norm, position_tables
from llmopt.models.decoder import logits as head_logits
from llmopt.models.families import Fold
from llmopt.quantizers.scaling import fold_scale, tie_heads

TOKENS = 48
SMALL = {"samples": 4, "seq_len": 64, "group_size": 32}
FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 2}
DENSE: list[tuple[str, dict[str, Any]]] = [
    ("phi3", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("falcon", {}),
    ("falcon", {"parallel_attn": False, "multi_query": False, "bias": True}),
    ("falcon", FALCON_40B),
    ("opt", {}),
]
MIXTURES: list[tuple[str, dict[str, Any]]] = [("mixtral", {}), ("qwen3_moe", {})]
METHODS = [{"method": "rtn"}, {"method": "gptq", "sweeps": 1}, {"method": "awq", "symmetric": True, "grid": 4}]
W8A8 = {"method": "smoothquant", "group_size": -1}


@pytest.fixture(scope="module")
def short_text(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text(text.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return file


def quantize(model: Path, text: Path, out: Path, **settings: Any) -> Outcome:
    resolved = quantizers.resolve({**SMALL, **settings})
    common, folder = resolved.common, out.with_name(f"{out.name}-ids")
    ids = calibrate.from_text(model, text, folder, samples=common.samples, seq_len=common.seq_len, seed=common.seed)
    quantizers.check(model, resolved, ids)
    out.mkdir(parents=True)
    return quantizers.quantize(model, resolved, ids, out, silent)


def token_ids() -> torch.Tensor:
    return torch.randint(0, 320, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def blocks(source: Source) -> list[DecoderBlock]:
    return [load_block(source.checkpoint, source.config, source.reader, i) for i in range(source.config.layers)]


@torch.no_grad()
def ours(folder: Path, *, round_activations: bool = True) -> torch.Tensor:
    """Logits of our forward pass over the dequantized weights."""
    source = open_model(folder)
    checkpoint, config, ids = source.checkpoint, source.config, token_ids()
    x, tables = embed(checkpoint, config, ids), position_tables(config, TOKENS)
    for block in blocks(source):
        if not round_activations:
            block.input_transform.clear()
        x = block.forward(x, tables)
    return head_logits(final_norm(checkpoint, config)(x), load_head(checkpoint, config, source.reader), config)


@torch.no_grad()
def theirs(folder: Path, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    found: torch.Tensor = model.eval()(token_ids()).logits
    return found


def dequantized(folder: Path, out: Path) -> Path:
    """A plain float32 checkpoint under the same names with the weights that the quantized one stands for."""
    source = open_model(folder)
    config = source.config
    tensors = {name: torch.from_numpy(source.checkpoint.float_array(name)) for name in config.outer_shapes()}
    for block in blocks(source):
        tensors |= {f"{config.block(block.index)}.{name}": tensor for name, tensor in block.tensors.items()}
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    values = {key: value for key, value in source.checkpoint.config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(values | {"dtype": "float32"}))
    return out


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.filterwarnings("default", "ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: settings["method"])
@pytest.mark.parametrize(("model_type", "options"), [*DENSE, *MIXTURES])
def test_transformers_computes_the_dequantized_logits(
    make_checkpoint: Callable[..., Path],
    short_text: Path,
    tmp_path: Path,
    model_type: str,
    options: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """transformers fuses the experts of a mixture, which it dequantizes; its Falcon can only be loaded so."""
    dense = {"dtype": "float32"} if model_type in ("falcon", "mixtral", "qwen3_moe") else {}
    whole = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if model_type == "falcon" else {}
    base = make_checkpoint(model_type, **dense, **options)
    quantize(base, short_text, tmp_path / "q", **settings)
    assert apart(theirs(tmp_path / "q", **whole), ours(tmp_path / "q")) < 1e-5


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("model_type", "options"), DENSE)
def test_transformers_computes_our_int8_logits(
    make_checkpoint: Callable[..., Path], short_text: Path, tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    """Float rounding tips some activations to the next of 256 steps, so this is as close as two programs get."""
    base = make_checkpoint(model_type, **options)
    quantize(base, short_text, tmp_path / "q", **W8A8)
    twin = dequantized(tmp_path / "q", tmp_path / "twin")
    assert apart(theirs(twin), ours(tmp_path / "q", round_activations=False)) < 1e-5
    assert apart(theirs(tmp_path / "q"), ours(tmp_path / "q")) < 0.02


@pytest.mark.parametrize(("model_type", "options"), MIXTURES)
@pytest.mark.parametrize("settings", [W8A8, {"method": "awq", "grid": 4}], ids=lambda settings: settings["method"])
def test_what_transformers_cannot_load_of_a_mixture_has_the_right_weights(
    make_checkpoint: Callable[..., Path],
    short_text: Path,
    tmp_path: Path,
    model_type: str,
    options: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Its reader of experts knows neither int8 nor zero points, so it gets the weights that ours stand for."""
    base = make_checkpoint(model_type, **options)
    quantize(base, short_text, tmp_path / "q", **settings)
    plain = ours(tmp_path / "q", round_activations=False)
    assert apart(theirs(dequantized(tmp_path / "q", tmp_path / "twin")), plain) < 1e-5
    assert apart(plain, ours(base)) < 0.5


@pytest.mark.parametrize("model_type", ["gemma2", "opt"])
def test_perplexity_is_that_of_transformers(
    make_checkpoint: Callable[..., Path], short_text: Path, tmp_path: Path, model_type: str
) -> None:
    """With soft caps on the logits, and with learned positions."""
    base = make_checkpoint(model_type, dtype="float32")
    settings = evaluate.resolve({"windows": 2, "seq_len": TOKENS})
    metrics = evaluate.evaluate(base, None, short_text, settings, tmp_path, silent).metrics
    config = open_model(base).config
    ids = torch.from_numpy(evaluate.evaluation_windows(base, short_text, settings, config))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        loss = model(ids, labels=ids).loss
    assert metrics["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


SCALED = [("llama", {}), ("qwen2", {}), *DENSE, *MIXTURES]


@pytest.mark.parametrize(("model_type", "options"), SCALED)
@torch.no_grad()
def test_folding_scales_changes_nothing(
    make_checkpoint: Callable[..., Path], model_type: str, options: dict[str, Any]
) -> None:
    """Every site that can be scaled is, by random numbers; the site's input is divided, the block's output stays."""
    checkpoint = Checkpoint.open(make_checkpoint(model_type, dtype="float32", **options))
    config = DecoderConfig.read(checkpoint)
    x, tables = embed(checkpoint, config, token_ids()), position_tables(config, TOKENS)
    for index in range(config.layers):
        block = load_block(checkpoint, config, None, index)
        before, folded = block.forward(x, tables), 0
        for site in config.sites(index):
            if site.scaled_by is None:
                continue
            weight = block.tensors[f"{site.linears[0]}.weight"]
            scale_I = tied(
                site.scaled_by, torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(2)) + 0.5
            )
            got = fold_scale(block, site, scale_I, "F32")
            assert torch.allclose(got, scale_I, rtol=1e-4)
            assert torch.equal(block.tensors[f"{site.linears[0]}.weight"], weight * got)
            folded += 1
        assert folded >= 2
        assert apart(block.forward(x, tables), before) < 1e-5
        x = before


def tied(fold: Fold, scale_I: torch.Tensor) -> torch.Tensor:
    """One scale for all channels that one row makes."""
    if fold.rows is None:
        return scale_I
    shape = (fold.rows.count, fold.rows.repeats, fold.rows.size)
    return scale_I.view(shape)[:, :1].expand(shape).reshape(-1)


@torch.no_grad()
def test_a_norm_that_stores_its_weight_less_one_takes_a_scale_in_half_precision(
    make_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint("gemma2"))
    config = DecoderConfig.read(checkpoint)
    x, tables = embed(checkpoint, config, token_ids()), position_tables(config, TOKENS)
    block, site = load_block(checkpoint, config, None, 0), config.sites(0)[0]
    before, stored = block.forward(x, tables), block.tensors["input_layernorm.weight"]
    fold_scale(block, site, torch.linspace(0.3, 3.0, config.hidden_size), "BF16")
    changed = block.tensors["input_layernorm.weight"]
    assert torch.equal(changed, changed.bfloat16().float())
    assert not torch.equal(changed, stored)
    assert apart(block.forward(x, tables), before) < 1e-5


@pytest.mark.parametrize(("model_type", "options"), [("falcon", {}), ("falcon", FALCON_40B), ("phi3", {})])
def test_channels_of_one_row_get_one_scale(
    make_checkpoint: Callable[..., Path], model_type: str, options: dict[str, Any]
) -> None:
    config = DecoderConfig.read(Checkpoint.open(make_checkpoint(model_type, **options)))
    site = next(site for site in config.sites(0) if site.name == "o")
    assert site.scaled_by is not None
    channels = config.heads * config.head_dim
    found_I = tie_heads(torch.arange(channels).float() + 1, site)
    assert torch.equal(found_I, tied(site.scaled_by, found_I))
    assert len(found_I.unique()) == config.kv_heads * config.head_dim


@pytest.mark.parametrize(
    ("model_type", "options", "scalable"),
    [
        ("llama", {}, ["qkv", "o", "gate_up", "down"]),
        ("gpt_neox", {}, ["qkv", "o", "up"]),
        ("opt", {}, ["qkv", "o", "up", "down"]),
        ("opt", {"activation_function": "gelu"}, ["qkv", "o", "up"]),
        ("falcon", {}, ["qkv_up", "o"]),
        ("mixtral", {"num_local_experts": 2}, ["qkv", "o", "experts.0.down", "experts.1.down"]),
    ],
)
def test_only_what_is_linear_up_to_a_site_can_take_its_scale(
    make_checkpoint: Callable[..., Path], model_type: str, options: dict[str, Any], scalable: list[str]
) -> None:
    config = DecoderConfig.read(Checkpoint.open(make_checkpoint(model_type, **options)))
    assert [site.name for site in config.sites(0) if site.scaled_by is not None] == scalable


@pytest.mark.parametrize("settings", [*METHODS[1:], W8A8], ids=lambda settings: settings["method"])
def test_an_expert_without_a_token_is_rounded_to_nearest_and_told(
    make_checkpoint: Callable[..., Path], short_text: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    base = make_checkpoint("mixtral", num_local_experts=16, num_experts_per_tok=1)
    outcome = quantize(base, short_text, tmp_path / "q", **settings | {"samples": 1, "seq_len": 8})
    unseen = [event for event in outcome.events if event.endswith("saw no calibration token")]
    assert len(unseen) >= 2 * 2 * 8  # of 16 experts at most 8 see one of 8 tokens: two sites each, in two blocks
    assert all(".experts." in event for event in unseen)
    prefix, expert = unseen[0].split(".experts.")[0], int(unseen[0].split(".experts.")[1].split(".")[0])
    name = f"{prefix}.block_sparse_moe.experts.{expert}.w2"
    source = open_model(tmp_path / "q")
    assert source.reader is not None
    weight = source.reader.linear(name, (128, 256))
    assert weight is not None
    rounded = torch.from_numpy(weight.dequantize())
    assert apart(rounded, Checkpoint.open(base).tensor(f"{name}.weight").float()) < 0.2


def test_experts_cannot_have_static_activation_scales(make_checkpoint: Callable[..., Path], short_text: Path) -> None:
    settings = quantizers.resolve({**SMALL, **W8A8, "activations": "static"})
    with pytest.raises(SettingsError, match="static activation scales"):
        quantizers.check(make_checkpoint("mixtral"), settings, short_text)


def test_what_a_model_does_not_compute_with_is_neither_checked_nor_passed_on(
    make_checkpoint: Callable[..., Path], short_text: Path, tmp_path: Path
) -> None:
    """GPT-NeoX checkpoints of old store a causal mask, and minus infinity as half precision has it."""
    folder = Path(shutil.copytree(make_checkpoint("gpt_neox", dtype="float16"), tmp_path / "old"))
    tensors = load_file(folder / "model.safetensors")
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9).half()
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantize(folder, short_text, tmp_path / "q", method="rtn")
    assert not any("masked_bias" in name for name in Checkpoint.open(tmp_path / "q").tensors)


def test_an_expert_that_saw_few_tokens_is_made_up_for_and_told(
    make_checkpoint: Callable[..., Path], short_text: Path, tmp_path: Path
) -> None:
    base = make_checkpoint("mixtral", num_local_experts=4, num_experts_per_tok=1)
    outcome = quantize(base, short_text, tmp_path / "q", method="gptq", samples=1, seq_len=32)
    few = [event for event in outcome.events if ".experts." in event and "saw only" in event]
    assert few
    assert all("made up for by an even Hessian" in event for event in few)
