"""Which models engine mode knows, as data: what TensorRT-LLM's model classes have, and what they take for granted.

Sources, all of TensorRT-LLM up to 1.2: tensorrt_llm/models/{llama,qwen,falcon}/{config,model}.py,
models/gptneox/model.py, and ModelOpt 0.47, torch/export/layer_utils.py, for the names of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llmopt.formats.scheme import Scheme

INPUT_NORM, POST_NORM = "input_layernorm", "post_layernorm"
MLP_NORM = "mlp_layernorm"  # of Falcon's blocks that have a norm for each branch

AWQ, FP8 = "W4A16_AWQ", "FP8"
SMOOTH_STATIC, SMOOTH_DYNAMIC = "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"

#: `quant_algo` and the scheme of our formats that it stands for; AWQ's group size is said beside it.
ALGORITHMS: Mapping[str, Scheme] = {
    AWQ: Scheme(bits=4, group_size=128, symmetric=True),
    FP8: Scheme(bits=8, group_size=0, symmetric=True, activations="static", kind="float"),
    SMOOTH_STATIC: Scheme(bits=8, group_size=-1, symmetric=True, activations="static"),
    SMOOTH_DYNAMIC: Scheme(bits=8, group_size=-1, symmetric=True, activations="dynamic"),
}
#: What the groupwise kernels hold (cpp/tensorrt_llm/plugins/weightOnlyGroupwiseQuantMatmulPlugin).
GROUP_SIZES = (64, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFamily:
    """One row: a `model_type` of ours, and the class that `architecture` names in TensorRT-LLM.

    decoder: ModelOpt's name for it. since: the first TensorRT-LLM whose class has it. norms: of a block. eps: what the
    class has for every norm whatever config.json says, None where it reads `norm_epsilon`. heads: whether the size of
    a head can be set apart from the hidden size. mlp_ratio: of the inner size, where the class knows no other.
    """

    model_type: str
    architecture: str
    decoder: str
    since: tuple[int, ...] = (0, 21)
    rms: bool = True
    gated: bool = True
    norms: tuple[str, ...] = (INPUT_NORM, POST_NORM)
    qk_norm: bool = False
    dense_bias: bool = True  # whether the output projection can have one
    algorithms: tuple[str, ...] = (AWQ, FP8, SMOOTH_STATIC, SMOOTH_DYNAMIC)
    pipeline: bool = True
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    eps: float | None = None
    heads: bool = True
    mlp_ratio: int | None = None


_LLAMA = EngineFamily(model_type="llama", architecture="LlamaForCausalLM", decoder="llama")
_QWEN2 = EngineFamily(model_type="qwen2", architecture="Qwen2ForCausalLM", decoder="qwen", dense_bias=False)
#: LayerNorm in these classes is made without an epsilon, which is 1e-5 then.
_LAYER_NORM = replace(_LLAMA, rms=False, gated=False, rope_types=("default",), eps=1e-5, heads=False)

FAMILIES: Mapping[str, EngineFamily] = {
    row.model_type: row
    for row in (
        _LLAMA,
        replace(_LLAMA, model_type="mistral", architecture="MistralForCausalLM"),
        _QWEN2,
        replace(
            _QWEN2,
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            since=(1, 0),  # pull request 5650, of July 2025
            qk_norm=True,
            algorithms=(AWQ, FP8, SMOOTH_STATIC),  # SmoothQuantAttention would leave the norms of q and k out
        ),
        # Which norms a block has is said by config.json (`EngineConfig.norms`).
        replace(
            _LAYER_NORM,
            model_type="falcon",
            architecture="FalconForCausalLM",
            decoder="falcon",
            algorithms=(AWQ, FP8),  # examples/models/contrib/falcon
        ),
        replace(
            _LAYER_NORM,
            model_type="gpt_neox",
            architecture="GPTNeoXForCausalLM",
            decoder="gptneox",
            norms=(INPUT_NORM, "post_attention_layernorm"),
            algorithms=(AWQ,),  # its GPTQ (examples/models/contrib/gptneox) runs in the same layers
            pipeline=False,  # every rank would have the embedding and the last norm
            mlp_ratio=4,
        ),
    )
}
BY_ARCHITECTURE: Mapping[str, EngineFamily] = {row.architecture: row for row in FAMILIES.values()}
