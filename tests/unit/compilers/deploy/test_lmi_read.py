"""serving.properties as a pipeline: what becomes a setting, what is kept, and that everything else is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployments import ENGINE, VLLM

from llmopt.compilers import deploy
from llmopt.compilers.deploy import lmi, lmi_names, lmi_read
from llmopt.compilers.deploy.base import Deployment
from llmopt.compilers.deploy.lmi_read import Read
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.errors import Exit, LlmoptError, SettingsError
from llmopt.pipeline import plan
from llmopt.profiles.settings import build
from llmopt.quantizers.settings import resolve

ReadText = Callable[[str], Read]

#: What a user of LMI's TensorRT-LLM container has: trt_llm_user_guide.md, every kind of property.
USERS_FILE = """\
engine=MPI
option.model_id=meta-llama/Llama-2-7b-chat-hf
option.revision=main
option.rolling_batch=trtllm
option.tensor_parallel_degree=4
option.max_rolling_batch_size=64
option.dtype=fp16
option.quantize=smoothquant
option.smoothquant_alpha=0.8
option.smoothquant_per_token=true
option.smoothquant_per_channel=True
option.calib_size=256
option.max_input_len=2048
option.max_output_len=512
option.max_num_tokens=16384
option.tokens_per_block=64
option.kv_cache_free_gpu_mem_fraction=0.9
option.enable_kv_cache_reuse=true
option.batch_scheduler_policy=max_utilization
option.output_formatter=jsonlines
option.model_loading_timeout=3600
option.trust_remote_code=true
option.rotary_base=10000
job_queue_size=500
"""


@pytest.fixture
def read(tmp_path: Path) -> ReadText:
    def file(text: str) -> Read:
        path = tmp_path / "serving.properties"
        path.write_text(text, encoding="latin-1")
        return lmi_read.read(str(path))

    return file


def refused(read: ReadText, text: str) -> LlmoptError:
    with pytest.raises(LlmoptError) as caught:
        read(text)
    return caught.value


def section(found: Read, name: str) -> dict[str, Any]:
    return found.profile.section(name)


def test_a_users_file_is_quantized_and_compiled_here(read: ReadText) -> None:
    found = read(USERS_FILE)
    assert found.profile.model == "meta-llama/Llama-2-7b-chat-hf@main"
    assert section(found, "quantize") == {
        "method": "smoothquant",
        "alpha": 0.8,
        "activations": "dynamic",
        "samples": 256,
    }
    assert section(found, "compile") == {
        "target": "tensorrt-llm",
        "version": "0.21.0rc1",
        "mode": "engine",
        "emit": ["lmi"],
        "tensor_parallel": 4,
        "max_batch_size": 64,
        "dtype": "float16",
        "max_input_len": 2048,
        "max_seq_len": 2560,
        "max_num_tokens": 16384,
        "build": {"tokens_per_block": 64},
        "serve": {"kv_cache_config": {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": True}},
        "loading_timeout_s": 3600,
        "trust_remote_code": True,
        "lmi": {
            "option.batch_scheduler_policy": "max_utilization",
            "option.output_formatter": "jsonlines",
            "job_queue_size": "500",
        },
    }


def test_what_is_not_carried_is_told_with_its_line(read: ReadText) -> None:
    told = [note.split(": ", 2)[:2] for note in read(USERS_FILE).notes]
    assert told == [
        ["serving.properties:1", "`engine=MPI`"],
        ["serving.properties:4", "`option.rolling_batch=trtllm`"],
        ["serving.properties:14", "`option.max_output_len=512`"],
        ["serving.properties:19", "`option.batch_scheduler_policy=max_utilization`"],
        ["serving.properties:23", "`option.rotary_base=10000`"],
    ]


def test_the_stages_take_what_is_read(read: ReadText) -> None:
    found = read(USERS_FILE)
    resolve(section(found, "quantize"))
    build(Settings, section(found, "compile"), where="compile")


@pytest.mark.parametrize("target", ["tensorrt-llm", "vllm"])
def test_every_property_that_is_known_is_a_setting_kept_or_told(read: ReadText, target: str) -> None:
    """No property may go without a trace: with it, the settings or the notes differ from those without."""
    rolling = {"tensorrt-llm": "trtllm", "vllm": "vllm"}[target]
    base = f"option.rolling_batch={rolling}\noption.quantize=fp8\n"
    values = {
        **dict.fromkeys([*lmi_names.KEPT, *lmi_names.OUTDATED, *lmi_names.DROPPED], "1"),
        **{name: _sample(convert) for name, (_, convert) in lmi_names.TABLES[target].items()},  # type: ignore[index]
        **dict.fromkeys(lmi_names.QUANTIZE_DETAILS, "1"),
        "option.max_output_len": "4096",
        "option.tensor_parallel_degree": "max",
        "option.dtype": "bf16",
        "option.entryPoint": "model.py",
        "option.mpi_mode": "true",
        "option.async_mode": "false",
        "engine": "MPI",
        "option.enable_expert_parallel": "true",
        "option.model_id": "org/name",
        "option.revision": "abc",
        "option.quantization": "awq",
        "option.quant_algo": "FP8",
        "option.kv_cache_quant_algo": "FP8",
        "option.smoothquant_per_token": "true",
        "option.smoothquant_per_channel": "true",
        "option.q_format": "int4_awq",
        "option.awq_format": "int4_awq",
    }
    assert set(values) >= {*lmi_names.TABLES[target], *lmi_names.READ_APART} - {  # type: ignore[index]
        *("option.rolling_batch", "option.quantize"),  # in every file here
        "option.has_zero_point",  # false is what is done, and true an error
    }
    before = read(base)
    for name, value in values.items():
        after = read(f"{base}{name}={value}\n")
        assert (after.profile.sections, after.notes, after.profile.model) != (
            before.profile.sections,
            before.notes,
            before.profile.model,
        ), name


def _sample(convert: lmi_names.Convert) -> str:
    for text in ("3", "true", "0.5"):
        try:
            convert(text)
        except (ValueError, KeyError):
            continue
        return text
    raise AssertionError(convert)


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ("option.quantize=awq", {"method": "awq", "bits": 4, "group_size": 128, "symmetric": True}),
        (
            "option.quantize=awq\noption.q_format=int4_awq\noption.awq_block_size=64\noption.calib_size=32",
            {"method": "awq", "bits": 4, "group_size": 64, "symmetric": True, "samples": 32},
        ),
        ("option.quantize=fp8", {"method": "fp8", "weights": "tensor", "activations": "static"}),
        ("option.quantize=gptq", {"method": "gptq", "bits": 4, "group_size": 128, "symmetric": True}),
        (
            "option.quantize=smoothquant\noption.smoothquant_per_token=false",
            {"method": "smoothquant", "activations": "static"},
        ),
        (
            "option.quant_algo=W8A8_SQ_PER_CHANNEL\noption.smoothquant_val=0.5\noption.calib_max_seq_length=256",
            {"method": "smoothquant", "activations": "static", "alpha": 0.5, "seq_len": 256},
        ),
        (
            "option.quant_algo=FP8\noption.kv_cache_quant_algo=FP8",
            {"method": "fp8", "weights": "tensor", "activations": "static", "kv_cache": "fp8"},
        ),
    ],
)
def test_quantizations_of_tensorrt_llm(read: ReadText, properties: str, expected: dict[str, object]) -> None:
    found = read(f"option.rolling_batch=trtllm\n{properties}\n")
    assert section(found, "quantize") == expected
    resolve(expected)


def test_a_detail_of_another_method_is_told(read: ReadText) -> None:
    found = read("option.rolling_batch=trtllm\noption.quantize=awq\noption.smoothquant_alpha=0.5\n")
    assert "alpha" not in section(found, "quantize")
    assert found.notes[-1].endswith("`option.smoothquant_alpha=0.5`: not carried: the method is `awq`")


def test_details_without_a_quantization_are_told(read: ReadText) -> None:
    found = read("option.rolling_batch=trtllm\noption.calib_size=64\n")
    assert "quantize" not in found.profile.sections
    assert found.notes[-1].endswith("`option.calib_size=64`: not carried: nothing is quantized here")


def test_the_first_of_two_names_of_a_quantization_counts_and_the_other_is_told(read: ReadText) -> None:
    found = read("option.rolling_batch=trtllm\noption.quant_algo=FP8\noption.quantize=awq\n")
    assert section(found, "quantize")["method"] == "awq"
    assert found.notes[-1].endswith("`option.quant_algo=FP8`: not carried: `option.quantize` says how")


def test_a_zero_point_is_refused_for_engines(read: ReadText) -> None:
    asked = "option.rolling_batch=trtllm\noption.quantize=awq\noption.has_zero_point="
    assert "symmetric weights" in str(refused(read, f"{asked}true\n").hint)
    assert section(read(f"{asked}false\n"), "quantize")["symmetric"] is True


def test_an_older_handler_of_lmis_is_told(read: ReadText) -> None:
    found = read("option.entryPoint=djl_python.huggingface\n")
    assert found.notes[-1].endswith("not carried: LMI's handler for `vllm` is `djl_python.lmi_vllm.vllm_async_service`")


@pytest.mark.parametrize("model", ["s3://bucket/x/", "./weights", "{{id}}"])
def test_a_revision_of_what_is_no_hubs_is_told(read: ReadText, model: str) -> None:
    found = read(f"option.rolling_batch=vllm\noption.model_id={model}\noption.revision=abc\n")
    assert "@abc" not in str(found.profile.model)
    assert found.notes[-1].endswith("`option.revision=abc`: not carried: it is for a model of the hub")


def test_an_unknown_quantization_is_an_error_with_those_known(read: ReadText) -> None:
    error = refused(read, "option.rolling_batch=trtllm\noption.quantize=smothquant\n")
    assert error.message == "serving.properties:2: `option.quantize` cannot be `smothquant` here"
    assert error.hint == "did you mean `smoothquant`?"
    assert error.code == Exit.USAGE


def test_vllm_quantizes_on_the_fly_only_to_fp8(read: ReadText) -> None:
    assert section(read("option.rolling_batch=vllm\noption.quantize=fp8\n"), "quantize") == {"method": "fp8"}
    quantized = read("option.rolling_batch=vllm\noption.quantize=awq\n")
    assert "quantize" not in quantized.profile.sections
    assert "quantized already" in quantized.notes[-1]
    later = read("option.rolling_batch=vllm\noption.quantize=bitsandbytes8\n")
    assert section(later, "compile")["serve"] == {"quantization": "bitsandbytes"}


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("option.rolling_batch=trtllm\n", "tensorrt-llm"),
        ("option.rolling_batch=vllm\n", "vllm"),
        ("option.rolling_batch=lmi-dist\n", "vllm"),
        ("option.entryPoint=djl_python.lmi_trtllm.trtllm_async_service\n", "tensorrt-llm"),
        ("option.entryPoint=djl_python.huggingface\n", "vllm"),
        ("option.rolling_batch=auto\noption.kv_cache_free_gpu_mem_fraction=0.9\n", "tensorrt-llm"),
        ("option.rolling_batch=auto\noption.max_model_len=4096\n", "vllm"),
        ("engine=Python\noption.mpi_mode=true\noption.max_num_tokens=50000\n", "tensorrt-llm"),  # LMI's quick start
        ("engine=Python\noption.tensor_parallel_degree=max\n", "vllm"),  # LMI's quick start
        ("option.quantize=smoothquant\n", "tensorrt-llm"),
    ],
)
def test_the_target_is_the_engine_that_the_container_would_run(read: ReadText, text: str, target: str) -> None:
    assert section(read(text), "compile")["target"] == target


def test_a_target_that_the_file_leaves_open_is_told(read: ReadText) -> None:
    assert "leaves the engine to the container: taken for `vllm`" in read("option.max_model_len=4096\n").notes[0]
    assert not read("option.entryPoint=djl_python.lmi_vllm.vllm_async_service\n").notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("option.rolling_batch=deepspeed\n", "`option.rolling_batch` cannot be `deepspeed` here"),
        ("engine=PyTorch\n", "`engine` cannot be `PyTorch` here"),
        ("option.rolling_batch=vllm\noption.max_model_len=many\n", "must be a whole number, not `many`"),
        ("option.rolling_batch=vllm\noption.max_model_len=1_000\n", "must be a whole number, not `1_000`"),
        ("option.rolling_batch=trtllm\noption.enable_kv_cache_reuse=1\n", "must be true or false, not `1`"),
        ("option.rolling_batch=trtllm\noption.kv_cache_free_gpu_mem_fraction=nan\n", "must be a number, not `nan`"),
        ("option.dtype=int3\n", "`option.dtype` cannot be `int3` here"),
        (
            "option.rolling_batch=trtllm\noption.quantize=awq\noption.q_format=int2\n",
            "`option.q_format` cannot be `int2`",
        ),
        ("option.x=\\u12\n", "malformed \\uxxxx encoding"),
        ("option.dtype=fp16\noption.dtype=bf16\n", "`option.dtype` is given twice"),
    ],
)
def test_bad_input_is_an_error_with_its_line(read: ReadText, text: str, message: str) -> None:
    error = refused(read, text)
    assert error.message.startswith("serving.properties:")
    assert message in error.message
    assert error.hint


def test_a_misspelt_property_is_an_error_with_the_right_one(read: ReadText) -> None:
    error = refused(read, "option.tensor_paralel_degree=4\n")
    assert error.message == "serving.properties:1: `option.tensor_paralel_degree` is no property of LMI"
    assert error.hint == "did you mean `option.tensor_parallel_degree`?"


def test_an_unknown_property_goes_where_lmi_would_send_it_and_is_told(read: ReadText) -> None:
    vllm = read("option.rolling_batch=vllm\noption.mamba_ssm_cache_dtype=float32\n")
    assert section(vllm, "compile")["serve"] == {"mamba_ssm_cache_dtype": "float32"}
    assert "passed to vLLM as it is" in vllm.notes[-1]
    engine = read("option.rolling_batch=trtllm\noption.some_new_thing=1\n")
    assert section(engine, "compile")["lmi"] == {"option.some_new_thing": "1"}
    assert "kept for the container as it is" in engine.notes[-1]


def test_properties_that_contradict_each_other_are_an_error(read: ReadText) -> None:
    error = refused(
        read,
        "option.rolling_batch=trtllm\noption.free_gpu_memory_fraction=0.8\noption.kv_cache_free_gpu_mem_fraction=0.9\n",
    )
    assert "and `option.free_gpu_memory_fraction` on line 2 contradict each other" in error.message


def test_two_names_with_one_value_are_no_contradiction(read: ReadText) -> None:
    found = read("option.rolling_batch=trtllm\noption.max_batch_size=8\noption.max_rolling_batch_size=8\n")
    assert section(found, "compile")["max_batch_size"] == 8


def test_max_output_len_is_the_whole_sequence_as_lmi_has_it_now(read: ReadText) -> None:
    found = read("option.rolling_batch=trtllm\noption.max_input_len=1024\noption.max_output_len=4096\n")
    assert section(found, "compile")["max_seq_len"] == 4096
    assert "as LMI passes it on" in found.notes[-1]


def test_all_gpus_is_no_number(read: ReadText) -> None:
    found = read("option.rolling_batch=trtllm\noption.tensor_parallel_degree=max\n")
    assert "tensor_parallel" not in section(found, "compile")
    assert "--set compile.tensor_parallel=N" in found.notes[-1]


def test_a_model_on_s3_is_read_from_there(read: ReadText) -> None:
    found = read("option.rolling_batch=vllm\noption.model_id=s3://bucket/llama\n")
    assert found.profile.model == "s3://bucket/llama"
    assert not [note for note in found.notes if "model_id" in note]


@pytest.mark.parametrize("model", ["{{s3url}}", "<your model id>", "", "${MODEL}", "djl://ai.djl/x"])
def test_a_model_that_is_none_is_told_and_can_be_given(read: ReadText, tmp_path: Path, model: str) -> None:
    found = read(f"option.rolling_batch=trtllm\noption.model_id={model}\n")
    assert found.profile.model is None
    assert "`--set model=...`" in found.notes[-1]
    assert plan.load(str(tmp_path / "serving.properties"), ["model=org/name"]).model == "org/name"
    with pytest.raises(SettingsError, match="names no model"):
        plan.load(str(tmp_path / "serving.properties"))


def test_a_model_beside_the_file_is_found(read: ReadText, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    assert read("option.model_id=weights\n").profile.model == str(tmp_path / "weights")
    assert read("engine=Python\n").profile.model is None
    (tmp_path / "config.json").write_text("{}")
    assert read("engine=Python\n").profile.model == str(tmp_path)


def test_a_handler_of_the_users_is_kept(read: ReadText) -> None:
    found = read("option.rolling_batch=vllm\noption.entryPoint=model.py\n")
    assert section(found, "compile")["lmi"] == {"option.entryPoint": "model.py"}


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="cannot be read: No such file"):
        lmi_read.read(str(tmp_path / "serving.properties"))


def test_an_impossible_setting_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "serving.properties"
    file.write_text(
        "option.model_id=org/name\noption.rolling_batch=trtllm\noption.max_input_len=4096\noption.max_seq_len=2048\n"
    )
    with pytest.raises(SettingsError) as caught:
        plan.load(str(file))
    assert "serving.properties" in caught.value.message
    assert "max_input_len: 4096" in caught.value.message


def test_overrides_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serving.properties"
    file.write_text("option.model_id=org/name\noption.rolling_batch=trtllm\noption.quantize=fp8\n")
    pipeline = plan.load(str(file), ["compile.tensor_parallel=2", "model=elsewhere"])
    assert (pipeline.model, pipeline.sections["compile"]["tensor_parallel"]) == ("elsewhere", 2)
    assert pipeline.steps == ("quantize", "compile")
    assert pipeline.notes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Vllm:
    """The settings of a target of vLLM, as far as a deployment asks for them."""

    version: str
    url: str | None = None
    tensor_parallel: int = 1
    expert_parallel: int = 1
    max_batch_size: int = 256
    max_seq_len: int | None = None
    max_num_tokens: int | None = None
    trust_remote_code: bool = False
    loading_timeout_s: int = 1800
    lmi: dict[str, str] = dataclasses.field(default_factory=dict)
    serve: dict[str, Any] = dataclasses.field(default_factory=dict)


def again(deployment: Deployment, read: ReadText) -> Deployment:
    """The deployment of what is read from the file of another one."""
    found = read(lmi.emit(deployment)["serving.properties"])
    values = section(found, "compile")
    assert values["target"] == deployment.runtime
    dtype = values.get("dtype", "auto")
    if deployment.runtime == "tensorrt-llm":
        settings: object = build(Settings, values | {"url": deployment.url}, where="compile")
    else:
        own = {f.name for f in dataclasses.fields(_Vllm)}
        settings = _Vllm(**({k: v for k, v in values.items() if k in own} | {"version": deployment.version}))
        settings = dataclasses.replace(settings, url=deployment.url)
    return Deployment.of(
        settings,
        name=deployment.name,
        runtime=deployment.runtime,
        mode=deployment.mode,
        model=deployment.model,
        dtype=dtype,
    )


@pytest.mark.parametrize(
    "deployment",
    [
        ENGINE,
        dataclasses.replace(ENGINE, url=None, dtype="auto", lmi={}, block_reuse=None, gpu_memory_fraction=None),
        dataclasses.replace(ENGINE, pipeline_parallel=2, expert_parallel=2, max_beam_width=4, chunked_prefill=False),
        dataclasses.replace(ENGINE, trust_remote_code=True, serve={"kv_cache_config": {"host_cache_size": 1 << 30}}),
        VLLM,
        dataclasses.replace(VLLM, url=None, serve={}, lmi={"option.task": "text-generation", "job_queue_size": "9"}),
        dataclasses.replace(VLLM, kv_cache="fp8", expert_parallel=2, chunked_prefill=False, gpu_memory_fraction=None),
        dataclasses.replace(VLLM, serve={"enable_lora": True, "max_loras": 4, "limit_mm_per_prompt": {"image": 2}}),
    ],
)
def test_what_is_written_reads_back_to_the_same_file(read: ReadText, deployment: Deployment) -> None:
    """Once told again where the artifact lies, which is not what `option.model_id` says to us."""
    assert deploy.emit(["lmi"], again(deployment, read)) == deploy.emit(["lmi"], deployment)


@pytest.mark.parametrize("deployment", [ENGINE, VLLM])
def test_of_what_is_written_nothing_is_told(read: ReadText, deployment: Deployment) -> None:
    assert read(lmi.emit(deployment)["serving.properties"]).notes == ()
