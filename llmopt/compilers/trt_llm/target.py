"""The target `tensorrt-llm`: a plan, then all that the build needs, written and validated without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmopt.compilers.trt_llm.settings import Settings

if TYPE_CHECKING:
    pass

PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRTLLM(Settings):
    """`Settings` with the stages as methods; `compile` is not one of them, for no machine does it in one go."""

    portable: ClassVar[bool] = True

    def deps(self) -> tuple[str, ...]:
        return ("numpy", "safetensors")

    def check(self, model: Path) -> None:
        from llmopt.compilers.trt_llm.plan import make

        make(model, self)
