from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.errors import LlmoptError, SettingsError
from llmopt.models.checkpoint import Checkpoint
from llmopt.planner.memory import kv_sequence_bytes
from llmopt.planner.shape import ModelShape, of_config, read

#: Parameters, as the hub counts the tensors of these repositories.
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Qwen2.5-7B": 7_615_616_512,
    "Mixtral-8x7B": 46_702_792_704,
    "Gemma-2-9B": 9_241_705_984,
    "DeepSeek-V3": 671_026_419_200,  # without the 14B that predict a further token
    "DeepSeek-V2-Lite": 15_706_484_224,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
}
#: Billions that a token passes, as their makers say; gpt-oss leaves out the embedding.
ACTIVE = {
    "Mixtral-8x7B": 12.9,
    "DeepSeek-V3": 37,
    "Qwen3-30B-A3B": 3.3,
    "Qwen3-235B-A22B": 22,
    "Qwen1.5-MoE-A2.7B": 2.7,
    "Llama-4-Maverick": 17,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_tensors(name: str, published: dict[str, ModelShape]) -> None:
    assert published[name].parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_what_the_makers_say(name: str, published: dict[str, ModelShape]) -> None:
    assert published[name].active_parameters / 1e9 == pytest.approx(ACTIVE[name], rel=0.025)


@pytest.mark.parametrize(("name", "active"), [("gpt-oss-20b", 3.61), ("gpt-oss-120b", 5.13)])
def test_gpt_oss_counts_its_head_but_not_its_embedding(
    name: str, active: float, published: dict[str, ModelShape]
) -> None:
    shape = published[name]
    assert (shape.active_parameters - shape.embedding) / 1e9 == pytest.approx(active, rel=0.01)


def test_llama_4_is_400b_of_text_and_says_that_it_sees(published: dict[str, ModelShape]) -> None:
    shape = published["Llama-4-Maverick"]
    assert shape.parameters / 1e9 == pytest.approx(400, rel=0.01)
    assert shape.notes == ("of `llama4` only the text model is counted",)


def test_dense_models_pass_all_of_their_parameters(published: dict[str, ModelShape]) -> None:
    for name in ("Llama-3.1-8B", "Qwen2.5-7B", "Gemma-2-9B"):
        assert published[name].active_parameters == published[name].parameters
        assert not published[name].is_mixture


def test_grouped_queries_keep_eight_heads_of_keys_and_values(published: dict[str, ModelShape]) -> None:
    assert kv_sequence_bytes(published["Llama-3.1-70B"], 1, "int8") == 80 * 2 * 8 * 128


def test_latent_attention_keeps_the_latent_and_one_rotary_key(published: dict[str, ModelShape]) -> None:
    """70 KB a token in 16 bits, as DeepSeek-V3's report has it."""
    assert kv_sequence_bytes(published["DeepSeek-V3"], 1, "int8") == 61 * (512 + 64)
    assert kv_sequence_bytes(published["DeepSeek-V3"], 1, "int8") * 2 / 1e3 == pytest.approx(70, rel=0.01)


def test_a_window_bounds_what_its_layers_keep(published: dict[str, ModelShape]) -> None:
    gemma = published["Gemma-2-9B"]
    inside, beyond = kv_sequence_bytes(gemma, 4096, "int8"), kv_sequence_bytes(gemma, 8192, "int8")
    assert beyond == pytest.approx(1.5 * inside)  # every other layer has grown no further


def test_half_of_gpt_oss_looks_back_128_tokens(published: dict[str, ModelShape]) -> None:
    windows = [layer.window for layer in published["gpt-oss-20b"].layers]
    assert windows.count(128) == windows.count(None) == 12


def test_a_number_of_parameters_is_exact_and_names_the_layers_it_assumes() -> None:
    shape = read("70B")
    assert shape.parameters == 70_000_000_000
    assert kv_sequence_bytes(shape, 1, "int8") == 80 * 2 * 8 * 128
    assert "Llama 3.1 70B" in shape.notes[0]


@pytest.mark.parametrize(("text", "count"), [("0.5b", 500_000_000), ("7B", 7_000_000_000), ("350M", 350_000_000)])
def test_numbers_of_parameters_have_a_unit(text: str, count: int) -> None:
    assert read(text).parameters == count


def test_no_parameters_are_refused() -> None:
    with pytest.raises(SettingsError, match="no number of parameters"):
        read("0B")


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "mixtral",
        "qwen3_moe",
        "phi3",
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "falcon",
        "opt",
    ],
)
def test_counts_are_those_of_the_tensors_for_every_family(
    model_type: str, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint(model_type)
    tensors = Checkpoint.open(folder).tensors.values()
    shape = read(str(folder))
    found = sum(_elements(info.shape) for info in tensors)
    assert shape.parameters == found
    assert shape.notes == ()
    assert shape.stored_bytes == sum(info.size for info in tensors)


_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
_FOUR: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
PLANNED_ONLY: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT | {"n_shared_experts": 2, "q_lora_rank": None},
    "deepseek_v3": _LATENT | {"n_shared_experts": 1, "q_lora_rank": 48},
    "gpt_oss": _FOUR | {"num_local_experts": 4, "sliding_window": 16},
    "qwen2_moe": _FOUR | {"num_experts": 4, "shared_expert_intermediate_size": 96},
    "glm4_moe": _FOUR | {"n_routed_experts": 4, "n_shared_experts": 1, "use_qk_norm": True, "attention_bias": True},
    "llama4_text": _FOUR | {"num_local_experts": 4, "intermediate_size_mlp": 384, "interleave_moe_layer_step": 2},
    "gemma": {"head_dim": 32},
    # Known by no row: by their keys.
    "granite": {},
    "ernie4_5": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("model_type", PLANNED_ONLY)
@pytest.mark.filterwarnings("ignore")
def test_types_that_are_planned_only_are_counted_as_transformers_does(model_type: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(_SMALL | PLANNED_ONLY[model_type]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(each.numel() for each in model.parameters())
    count += sum(each.numel() for name, each in model.named_buffers() if name.endswith("score_correction_bias"))
    assert of_config(json.loads(config.to_json_string(use_diff=False)), name="x").parameters == count


def test_config_json_alone_is_enough_for_the_shipped_model(demo_model: Path) -> None:
    """The tensors are counted where they are there, so this leaves them behind."""
    alone = of_config(json.loads((demo_model / "config.json").read_text()), name="demo")
    held = sum(_elements(info.shape) for info in Checkpoint.open(demo_model).tensors.values())
    assert alone.parameters == held
    assert read(str(demo_model / "config.json")).parameters == held


def test_tensors_that_config_json_does_not_mean_are_told(tmp_path: Path, demo_model: Path) -> None:
    config = json.loads((demo_model / "config.json").read_text()) | {"intermediate_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(demo_model / "model.safetensors")
    assert "config.json means" in read(str(tmp_path)).notes[0]


def test_a_head_that_is_not_stored_is_tied(tmp_path: Path, demo_model: Path) -> None:
    config = json.loads((demo_model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(demo_model / "model.safetensors")
    shape = read(str(tmp_path))
    assert shape.head is None
    assert shape.notes == ()


def test_an_unknown_model_type_is_read_as_llama_and_says_so() -> None:
    config = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    shape = of_config({"model_type": "newest", "vocab_size": 100, **config}, name="x")
    assert shape.parameters == of_config({"model_type": "llama", "vocab_size": 100, **config}, name="x").parameters
    assert shape.notes == ("the model type `newest` is not known: read as a decoder like Llama",)


def test_an_unknown_mixture_is_read_by_its_usual_keys() -> None:
    config: dict[str, Any] = {
        "model_type": "newest_moe",
        "vocab_size": 100,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    }
    shape = of_config(config, name="x")
    assert [any(linear.count == 8 for linear in layer.linears) for layer in shape.layers] == [False, True]


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "layers of the kind `linear_attention`"),
        ({"mamba_d_state": 16}, "state-space layers"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
    ],
)
def test_what_is_no_stack_of_attention_is_refused_with_a_way_out(keys: dict[str, Any], what: str) -> None:
    config = {"model_type": "other", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(LlmoptError, match=what) as caught:
        of_config({**config, **keys}, name="x")
    assert "llmopt plan 70B" in (caught.value.hint or "")


def test_a_missing_size_is_named() -> None:
    with pytest.raises(LlmoptError, match="`num_attention_heads`"):
        of_config({"model_type": "llama", "hidden_size": 256}, name="x")


@pytest.mark.parametrize("text", ["nothing", "./nothing", "70X"])
def test_what_is_not_there_is_an_error_with_the_two_forms(text: str) -> None:
    with pytest.raises(LlmoptError, match="no model at") as caught:
        read(text)
    assert "70B" in (caught.value.hint or "")


def test_a_file_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LlmoptError, match="is not JSON"):
        read(str(tmp_path))


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def test_a_quantization_that_is_no_object_is_an_error() -> None:
    with pytest.raises(LlmoptError, match=r"`quantization_config` in config.json is `gptq`, not an object"):
        of_config(_SMALL | {"model_type": "llama", "quantization_config": "gptq"}, name="x")
