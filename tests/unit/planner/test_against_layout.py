"""The planner's ranks against the tensors that the TensorRT-LLM checkpoint's layout has, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmopt.compilers.trt_llm import plan
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.planner.memory import weight_bytes
from llmopt.planner.precision import PRECISIONS
from llmopt.planner.shape import read


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_ranks_of_an_engine_take_what_the_planner_says(
    model_type: str, ranks: int, stages: int, make_checkpoint: Callable[..., Path]
) -> None:
    """Within a percent: biases are split there, and counted whole on every rank here."""
    model = make_checkpoint(model_type, num_hidden_layers=4, tie_word_embeddings=False)
    settings = Settings(
        version="1.1.0",
        mode="engine",
        tensor_parallel=ranks,
        pipeline_parallel=stages,
        max_input_len=64,
        max_seq_len=128,
        max_num_tokens=128,
        max_batch_size=2,
    )
    made = plan.make(model, settings)
    planned = weight_bytes(read(str(model)), PRECISIONS["fp16"], ranks, stages)
    assert planned == pytest.approx(max(made.rank_bytes), rel=0.01)
