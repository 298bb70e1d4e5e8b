"""The settings of the target `tensorrt-llm`, checked against each other and against what the version knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from llmopt.artifacts.outcome import Json
from llmopt.compilers import deploy
from llmopt.compilers.trt_llm import rules, versions
from llmopt.errors import SettingsError
from llmopt.planner import hardware

_LONGEST = 8192  # tokens of a sequence, where a model takes more and the user has not said


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is prepared, and for which TensorRT-LLM and GPU.

    version: of TensorRT-LLM. mode: a checkpoint for `trtllm-build`, or one that `trtllm-serve` loads; auto: bundle
    where the version has it. dtype: of what is not quantized; auto: the checkpoint's. gpu: a name of the hardware
    table ("H100"), for its architecture and memory; None: any that has the arithmetic. kv_cache: auto: what the
    checkpoint has scales for. Lengths are in tokens, None: the model's own, to a limit (`sized`). build: further
    options of `trtllm-build`, serve: of `trtllm-serve` and its YAML, by TensorRT-LLM's own names. emit: deployments to
    write; for them url: where the artifact will lie; instance: the cloud instance they ask for; image: a container of
    the user's in place of the one that the deployment knows; loading_timeout_s: until a server counts as not started;
    lmi: further properties of AWS's LMI; served_name: the model's name for its clients.

    Raises SettingsError for what `rules.check_settings` refuses.
    """

    target: Literal["tensorrt-llm"] = "tensorrt-llm"
    aot: bool = True
    version: str = "1.2.1"
    mode: Literal["auto", "engine", "bundle"] = "auto"
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    gpu: str | None = None
    kv_cache: Literal["auto", "none", "fp8", "int8"] = "auto"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    max_batch_size: int = 64
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int = 8192
    max_beam_width: int = 1
    build: Mapping[str, Json] = field(default_factory=dict)
    serve: Mapping[str, Json] = field(default_factory=dict)
    emit: tuple[str, ...] = ()
    url: str | None = None
    instance: str | None = None
    image: str | None = None
    loading_timeout_s: int = 1800
    lmi: Mapping[str, str] = field(default_factory=dict)
    served_name: str = "model"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        deploy.check_names(self.emit)
        if not self.aot:
            raise SettingsError(
                "`compile.aot` cannot be false for `tensorrt-llm`", hint="it is compiled ahead of time, always"
            )
        rules.check_settings(self)

    @property
    def resolved_mode(self) -> versions.Mode:
        """`mode`, with auto replaced by what the version is used for."""
        return versions.find(self.version).modes[0] if self.mode == "auto" else self.mode

    def sized(self, positions: int) -> Self:
        """The same with the lengths that were left to a model of so many positions, to 8,192 of which half a prompt.

        Raises SettingsError where they do not go with the sizes that were given.
        """
        most = self.max_seq_len or max(min(positions, _LONGEST), self.max_input_len or 0)
        longest = self.max_input_len or max(min(most // 2, self.max_num_tokens), 1)
        return replace(self, max_seq_len=most, max_input_len=longest)

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def architecture(self) -> str | None:
        """As TensorRT-LLM's builds name it ("sm_90"); None where no GPU is named."""
        return None if self.gpu is None else hardware.find(self.gpu).architecture
