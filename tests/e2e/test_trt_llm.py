"""What a user does with `--target tensorrt-llm` on a machine without a GPU, and what goes wrong on the way.

No engine is built here. Where a GPU has to be found, a `nvidia-smi` that names one stands first in PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TARGET = ("--target", "tensorrt-llm")
ENGINE = (*TARGET, "--mode", "engine", "--gpu", "L4")
TWO_RANKS = (*ENGINE, "--tp", "2")
SMI = "#!/bin/sh\necho '0, GPU-0, {name}, 23034, 580.10, {capability}'\n"


@pytest.fixture(autouse=True)
def _no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose driver finds none."""
    smi(tmp_path / "bin", "#!/bin/sh\necho 'No devices were found' >&2\nexit 6\n", monkeypatch)


def smi(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(text)
    (folder / "nvidia-smi").chmod(0o755)
    if os.environ["PATH"].partition(":")[0] != str(folder):
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture(scope="module")
def quantized(shared: Any, model: Path) -> Path:
    made = shared("quantize", model, "--method", "rtn", "--json").json
    return Path(made["path"])


@pytest.fixture(scope="module")
def exported(shared: Any, quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared engine of two ranks and 4 bits, as a user keeps it: to be read only."""
    out = tmp_path_factory.mktemp("exported") / "prepared"
    ran = shared("compile", quantized, *TWO_RANKS, "--out", out, "--name", "mine")
    assert ran.code == 3, ran.err
    return out


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """A copy of it, to do with as one likes."""
    return writable(exported, tmp_path / "a copy")


def writable(source: Path, out: Path) -> Path:
    return shutil.copytree(source, out, copy_function=shutil.copyfile)


def result(ran: Any) -> dict[str, Any]:
    """The one JSON object of a run that could only prepare."""
    assert ran.code == 3, ran.err
    value = json.loads(ran.out)
    assert isinstance(value, dict)
    return value


def kinds(llmopt: Any) -> list[str]:
    return sorted(artifact["kind"] for artifact in llmopt("store", "ls", "--json").json["artifacts"])


def test_a_prepared_engine_says_what_it_is_and_what_comes_next(shared: Any, exported: Path, quantized: Path) -> None:
    said = result(shared("compile", quantized, *TWO_RANKS, "--json"))
    assert (said["kind"], said["status"], said["cached"]) == ("engine", "prepared", True)
    assert said["metrics"]["quant_algo"] == "W4A16_AWQ"
    assert (said["metrics"]["architecture"], said["metrics"]["tensor_parallel"]) == ("sm_89", 2)
    assert said["probed"]["gpus"] == []
    assert said["artifact"][:19] in said["next"]
    inside = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert inside >= {
        "checkpoint/config.json",
        "checkpoint/rank0.safetensors",
        "checkpoint/rank1.safetensors",
        "build.sh",
        "commands.json",
        "engine.json",
        "plan.json",
        "serve.sh",
        "tokenizer.json",
    }


def test_the_second_run_does_nothing_and_is_quick(shared: Any, exported: Path, quantized: Path) -> None:
    runs = [shared("compile", quantized, *TWO_RANKS, "--json") for _ in range(2)]
    assert all(result(ran)["cached"] for ran in runs)
    assert all(ran.err == "" for ran in runs)
    assert min(ran.cpu_s for ran in runs) < 1.5


def test_another_store_gets_the_same_bytes(llmopt: Any, quantized: Path, exported: Path) -> None:
    said = result(llmopt("compile", quantized, *TWO_RANKS, "--json"))
    assert not said["cached"]
    listed = json.loads((exported / "llmopt.json").read_text())["files"]
    again = json.loads((Path(said["path"]) / "llmopt.json").read_text())["files"]
    assert again == listed


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((*TARGET, "--max-batch-sise", "3"), 2, "--max-batch-size"),
        ((*TARGET, "--set", "max_batch_sise=3"), 2, "`max_batch_size`"),
        ((*ENGINE, "--set", "build.gemm_plugn=auto"), 2, "`gemm_plugin`"),
        ((*TARGET, "--gpu", "H1000"), 2, "`H100`"),
        ((*TARGET, "--mode", "engin"), 2, "`engine`"),
        ((*TARGET, "--runtime-version", "1.2.7"), 2, "`1.2.1`"),
        ((*ENGINE, "--runtime-version", "1.4.0"), 2, "`mode: bundle`"),
        ((*TARGET, "--emit", "lmii"), 2, "`lmi`"),
        ((*TARGET, "--emit", "sagemaker"), 2, "s3://"),
        ((*TARGET, "--max-input-len", "600", "--max-seq-len", "500"), 2, "`max_seq_len"),
        ((*TARGET, "--max-seq-len", "100000"), 1, "1024 positions"),
        ((*ENGINE, "--tp", "3"), 2, "4 attention heads"),
        ((*TARGET, "--tp", "3"), 2, "4 attention heads"),
        ((*TARGET, "--jit"), 2, "`compile.aot`"),
        ((*TARGET, "--timeout", "60"), 2, "name a `--builder`"),
        ((*TARGET, "--builder", "/bin/sh", "--timeout", "0"), 2, "`--timeout` cannot be `0`"),
        ((*ENGINE, "--tp", "0"), 2, "`compile.tensor_parallel` cannot be `0`"),
        ((*ENGINE, "--pp", "6"), 2, "5 layers"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    shared: Any, model: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    before = shared("store", "ls", "--json").json
    ran = shared("compile", model, *arguments)
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert shared("store", "ls", "--json").json == before


def test_zero_points_are_refused_in_both_modes(llmopt: Any, model: Path) -> None:
    made = llmopt("quantize", model, "--method", "rtn", "--asymmetric", "--json").json
    for mode in ("engine", "bundle"):
        ran = llmopt("compile", made["path"], *TARGET, "--mode", mode)
        assert ran.code == 1, ran.err
        assert "zero points" in ran.err
    assert kinds(llmopt) == ["quantized-model"]


def test_fp8_is_refused_where_the_gpu_has_none(llmopt: Any, model: Path) -> None:
    fp8 = ("--method", "fp8", "--weights", "tensor", "--activations", "static", "--samples", 2, "--seq-len", 32)
    made = llmopt("quantize", model, *fp8, "--json").json
    ran = llmopt("compile", made["artifact"], *TARGET, "--mode", "engine", "--gpu", "A100")
    assert ran.code == 2, ran.err
    assert "`sm_80`" in ran.err
    assert result(llmopt("compile", made["artifact"], *TARGET, "--mode", "engine", "--gpu", "H100", "--json"))


def test_a_good_folder_is_valid_by_every_name(shared: Any, exported: Path) -> None:
    artifact = json.loads(shared("store", "show", "mine", "--json").out)["artifact"]
    for source in (exported, exported / "checkpoint", "mine", artifact[:19]):
        ran = shared("compile", source, "--validate", "--json")
        assert ran.json["valid"] is True
        assert (ran.json["ranks"], ran.json["tensors"]) == (2, 176)


def _flip(copy: Path) -> None:
    with (copy / "checkpoint" / "rank1.safetensors").open("r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def _swap(copy: Path) -> None:
    first, second = (copy / "checkpoint" / f"rank{rank}.safetensors" for rank in (0, 1))
    first.rename(copy / "aside")
    second.rename(first)
    (copy / "aside").rename(second)


def _twice(copy: Path) -> None:
    shutil.copyfile(copy / "checkpoint" / "rank0.safetensors", copy / "checkpoint" / "rank1.safetensors")


def _third(copy: Path) -> None:
    shutil.copyfile(copy / "checkpoint" / "rank0.safetensors", copy / "checkpoint" / "rank2.safetensors")


def _short(copy: Path) -> None:
    file = copy / "checkpoint" / "rank0.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def _edited(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(copy: Path) -> None:
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new))

    return damage


def _gone(name: str) -> Callable[[Path], None]:
    return lambda copy: (copy / name).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit flipped": (_flip, "rank1.safetensors"),
    "the ranks swapped": (_swap, "rank0.safetensors"),
    "one rank twice": (_twice, "is the part of rank 0"),
    "a rank too many": (_third, "rank2.safetensors"),
    "a rank missing": (_gone("checkpoint/rank1.safetensors"), "rank1.safetensors"),
    "a rank cut short": (_short, "rank0.safetensors"),
    "another size said": (_edited("checkpoint/config.json", '"hidden_size": 256', '"hidden_size": 512'), "512"),
    "no JSON": (_edited("checkpoint/config.json", "{", "["), "config.json"),
    "the tokenizer missing": (_gone("tokenizer.json"), "tokenizer.json"),
    "another architecture said": (_edited("engine.json", "sm_89", "sm_90"), "engine.json"),
    "the script edited": (_edited("build.sh", "--max_batch_size 64", "--max_batch_size 65"), "build.sh"),
    "the commands missing": (_gone("commands.json"), "commands.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_found_by_validate_and_by_resume(shared: Any, copy: Path, damage: str) -> None:
    apply, words = DAMAGES[damage]
    apply(copy)
    validated = shared("compile", copy, "--validate")
    assert validated.code == 4, validated.out + validated.err
    assert words in validated.err
    if damage != "a rank too many":  # no file of the artifact's own: the build does not look at it
        assert shared("compile", copy, "--resume", "--builder", "/bin/sh").code == 4


def test_without_its_list_of_files_a_damaged_checkpoint_is_still_found(shared: Any, copy: Path) -> None:
    (copy / "llmopt.json").unlink()
    assert shared("compile", copy, "--validate").code == 0
    _flip(copy)
    assert shared("compile", copy, "--validate").code == 4


def test_a_bundle_is_validated_as_well(llmopt: Any, quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert llmopt("compile", quantized, *TARGET, "--gpu", "H100", "--out", out).code == 3
    assert llmopt("compile", out, "--validate", "--json").json["what"] == "bundle for TensorRT-LLM"
    shard = sorted((out / "model").glob("*.safetensors"))[1]
    shard.chmod(0o644)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    ran = llmopt("compile", out, "--validate")
    assert ran.code == 4
    assert shard.name in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--validate", "--resume"), "`--validate` makes nothing"),
        (("--validate", "--tp", "2"), "`--validate` takes no settings"),
        (("--resume",), "--builder PYTHON"),
        (("--resume", "--builder", "/no/such/python"), "is no program"),
        (("--resume", "--builder", "/bin/sh", "--gpu", "H100"), "`--resume` takes no settings"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    shared: Any, exported: Path, arguments: tuple[str, ...], words: str
) -> None:
    ran = shared("compile", exported, *arguments)
    assert ran.code == 2, ran.err
    assert words in ran.err


def test_a_checkpoint_is_nothing_to_resume(shared: Any, model: Path) -> None:
    ran = shared("compile", model, "--resume", "--builder", "/bin/sh")
    assert ran.code == 2
    assert "takes an engine" in ran.err


def test_resume_refuses_a_machine_that_does_not_fit(
    shared: Any, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = ("compile", copy, "--resume", "--builder", "/bin/sh")
    ran = shared(*resume)
    assert ran.code == 3
    assert "No devices were found" in ran.err
    smi(tmp_path / "bin", SMI.format(name="NVIDIA H100", capability="9.0"), monkeypatch)
    ran = shared(*resume)
    assert ran.code == 3
    assert "`sm_89`" in ran.err
    assert "NVIDIA H100 (sm_90)" in ran.err
    smi(tmp_path / "bin", SMI.format(name="NVIDIA L4", capability="8.9"), monkeypatch)
    ran = shared(*resume)
    assert ran.code in (1, 3)  # the GPU fits, and a shell is no Python with tensorrt_llm
    assert "/bin/sh" in ran.err
    assert "Traceback" not in ran.err


def test_the_scripts_of_a_moved_copy_refuse_by_themselves(shared: Any, copy: Path, tmp_path: Path) -> None:
    for script in ("build.sh", "serve.sh"):
        ran = subprocess.run(["bash", copy / script], capture_output=True, text=True, timeout=60, cwd="/")
        assert ran.returncode == 3, ran.stderr
        assert ran.stderr.startswith("error: ")
    assert shared("compile", copy, "--validate").code == 0  # and left it as it was


def test_a_kill_in_mid_prepare_leaves_nothing_that_counts(llmopt: Any, quantized: Path) -> None:
    process = llmopt.start("compile", quantized, *TWO_RANKS)
    for line in process.stderr:
        if line.startswith("wrote block 2"):
            process.kill()
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert kinds(llmopt) == ["plan"]
    assert not result(llmopt("compile", quantized, *TWO_RANKS, "--json"))["cached"]
    assert list((llmopt.store / "tmp").iterdir()) == []
    assert kinds(llmopt) == ["engine", "plan"]
    assert llmopt("store", "verify").code == 0


def test_ctrl_c_in_mid_prepare_leaves_nothing(llmopt: Any, quantized: Path) -> None:
    process = llmopt.start("compile", quantized, *TWO_RANKS)
    for line in process.stderr:
        if line.startswith("wrote the embedding"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert kinds(llmopt) == ["plan"]


def test_two_at_once_prepare_the_same_artifact(llmopt: Any, quantized: Path) -> None:
    processes = [llmopt.start("compile", quantized, *TWO_RANKS, "--json") for _ in range(2)]
    outcomes = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [3, 3], outcomes
    assert len({json.loads(out)["artifact"] for out, _ in outcomes}) == 1
    assert kinds(llmopt) == ["engine", "plan"]


def test_a_full_folder_is_refused_before_the_work(llmopt: Any, quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    ran = llmopt("compile", quantized, *TWO_RANKS, "--out", tmp_path / "full")
    assert ran.code == 2, ran.err
    assert not (llmopt.store / "manifests").exists()
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"


@pytest.fixture
def pipeline(model: Path, tmp_path: Path) -> Path:
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"model: {model}\nquantize: {{method: rtn}}\n"
        "compile: {target: tensorrt-llm, mode: engine, gpu: L4, tensor_parallel: 2}\n"
        "bench: {concurrency: [1], requests: 2}\n"
    )
    return file


def test_a_pipeline_prepares_and_says_what_waits(llmopt: Any, pipeline: Path) -> None:
    assert llmopt("run", pipeline, "--dry-run").code == 0
    ran = llmopt("run", pipeline)
    assert ran.code == 3, ran.err
    assert "waits for compile-build" in ran.out
    said = result(llmopt("run", pipeline, "--json"))
    assert {stage["stage"]: stage.get("status") for stage in said["stages"]} == {
        "quantize": "complete",
        "compile-plan": "complete",
        "compile": "prepared",
        "bench": None,
    }
    assert said["status"] == "prepared"
    assert llmopt("run", pipeline, "--dry-run").code == 0  # with everything in the store


def test_a_misspelt_key_of_a_pipeline_is_told_with_its_line(llmopt: Any, pipeline: Path) -> None:
    pipeline.write_text(pipeline.read_text().replace("tensor_parallel", "tensor_paralel"))
    ran = llmopt("run", pipeline)
    assert ran.code == 2
    assert "pipeline.yaml:3: `compile` has no setting `tensor_paralel`" in ran.err
    assert "`tensor_parallel`" in ran.err


def test_serving_properties_are_run_as_they_are(llmopt: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "serving.properties"
    text = (
        f"engine=Python\noption.model_id={model}\noption.rolling_batch=trtllm\n"
        "option.tensor_parallel_degree=2\noption.max_rolling_batch_size=32\n"
        "option.max_input_len=256\noption.max_output_len=256\n"
    )
    file.write_text(text)
    said = result(llmopt("run", file, "--json"))
    assert said["metrics"]["tensor_parallel"] == 2
    engine = json.loads((Path(said["path"]) / "engine.json").read_text())
    assert (engine["max_batch_size"], engine["max_input_len"], engine["max_seq_len"]) == (32, 256, 512)
    file.write_text(text + "option.max_inptu_len=4\n")
    ran = llmopt("run", file)
    assert ran.code == 2
    assert "serving.properties:8: `option.max_inptu_len`" in ran.err
    assert "`option.max_input_len`" in ran.err


def test_deployments_lie_in_the_artifact(llmopt: Any, model: Path) -> None:
    emit = ("--emit", "triton,vllm,k8s", "--url", "s3://models/llama")
    said = result(llmopt("compile", model, *TARGET, "--gpu", "H100", *emit, "--json"))
    deploy = {path.name for path in (Path(said["path"]) / "deploy").iterdir()}
    assert deploy == {"triton", "vllm", "k8s"}


@pytest.mark.parametrize("command", ["serve", "bench"])
def test_what_was_only_prepared_cannot_be_used_here(shared: Any, exported: Path, command: str) -> None:
    ran = shared(command, exported)
    assert ran.code != 0
    assert "`serve.sh` where its GPU is" in ran.err
    assert "Traceback" not in ran.err
