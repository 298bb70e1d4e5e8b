"""The commands, the YAML and the scripts of a prepared artifact, against golden files and in a shell.

`python tests/unit/compilers/trt_llm/test_commands.py` writes the golden files anew.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmopt.compilers.trt_llm import commands
from llmopt.compilers.trt_llm.settings import Settings

GOLDEN = Path(__file__).parents[3] / "golden" / "trt_llm_commands"


def sized(**values: Any) -> Settings:
    """Settings for a model of many positions."""
    return Settings(**values).sized(131072)


CASES = {
    "bundle": sized(),
    "bundle-fp8-tp4": sized(
        version="1.3.0rc27",
        gpu="H100",
        kv_cache="fp8",
        dtype="bfloat16",
        tensor_parallel=4,
        expert_parallel=2,
        max_batch_size=256,
        max_num_tokens=2048,
        trust_remote_code=True,
        serve={
            "enable_chunked_prefill": True,
            "kv_cache_config": {"free_gpu_memory_fraction": 0.85, "enable_block_reuse": True},
            "cuda_graph_config": {"enable_padding": True, "max_batch_size": 256},
            "reasoning_parser": "qwen3",
        },
        served_name="it's a model",
    ),
    "engine": sized(mode="engine"),
    "engine-0.21": sized(version="0.21.0", kv_cache="int8", max_input_len=512, max_seq_len=1024, max_batch_size=4),
    "engine-tp2-pp2": sized(
        mode="engine",
        gpu="H100",
        tensor_parallel=2,
        pipeline_parallel=2,
        build={
            "gemm_plugin": "fp8",
            "use_fp8_context_fmha": True,
            "use_paged_context_fmha": "enable",
            "multiple_profiles": False,
            "reduce_fusion": "enable",
            "kv_cache_type": "paged",
            "monitor_memory": True,
            "weight_sparsity": False,
            "lora_plugin": "auto",
            "lora_dir": ["/adapters/a b", "/adapters/c"],
            "speculative_decoding_mode": "lookahead_decoding",
            "max_draft_len": 83,
        },
        serve={"num_postprocess_workers": 2, "log_level": "warning", "batching_type": "INFLIGHT"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_files_are_those_of_the_golden_folder(name: str) -> None:
    golden = {file.name: file.read_text(encoding="utf-8") for file in (GOLDEN / name).iterdir()}
    assert commands.files(CASES[name]) == golden


@pytest.mark.parametrize("name", CASES)
def test_every_brace_of_a_command_is_a_placeholder(name: str) -> None:
    said = commands.commands(CASES[name])
    words = [word for command in [*said["build"], said["serve"]] for word in command]  # type: ignore[misc, list-item, union-attr]
    for word in words:
        rest = str(word)
        for placeholder in commands.PLACEHOLDERS:
            rest = rest.replace(placeholder, "")
        assert "{" not in rest


def flags(argv: list[str]) -> dict[str, str]:
    return dict(itertools.pairwise(argv))


def test_an_engine_is_served_by_the_backend_that_was_the_default_until_1_0() -> None:
    assert "--backend" not in commands.serve_command(sized(version="0.21.0"))
    assert flags(commands.serve_command(sized(version="1.0.0")))["--backend"] == "trt"
    assert "--backend" not in commands.serve_command(sized(version="1.2.1"))


def test_a_pass_holds_no_more_tokens_than_all_sequences_have() -> None:
    small = sized(mode="engine", max_batch_size=2, max_input_len=64, max_seq_len=128)
    assert flags(commands.build_command(small))["--max_num_tokens"] == "256"
    assert commands.build_config(small)["max_num_tokens"] == 256


def test_the_yaml_says_how_much_memory_the_cache_takes_whatever_else_it_says_of_the_cache() -> None:
    plain = yaml.safe_load(commands.serve_yaml(sized()))
    assert plain["kv_cache_config"] == {"free_gpu_memory_fraction": 0.9}
    own = sized(serve={"kv_cache_config": {"enable_block_reuse": False}})
    said = yaml.safe_load(commands.serve_yaml(own))["kv_cache_config"]
    assert said == {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": False}


def test_no_block_is_reused_where_the_engine_cannot_read_it() -> None:
    engine = sized(mode="engine", kv_cache="int8")
    assert "enable_block_reuse" not in commands.serve_yaml(engine)
    said = yaml.safe_load(commands.files(engine, paged_context=False)["serve.yaml"])
    assert said["kv_cache_config"]["enable_block_reuse"] is False
    assert "enable_block_reuse" not in commands.serve_yaml(sized(), paged_context=False)


def test_fast_builds_are_managed_weights_in_the_config() -> None:
    config = commands.build_config(sized(mode="engine", build={"fast_build": True, "log_level": "debug"}))
    assert config["plugin_config"] == {"manage_weights": True}


def test_one_worker_builds_each_engine_unless_told_otherwise() -> None:
    assert "--workers" not in commands.build_command(sized(mode="engine"))
    two = sized(mode="engine", tensor_parallel=2)
    assert flags(commands.build_command(two))["--workers"] == "2"
    one = sized(mode="engine", tensor_parallel=2, build={"workers": 1})
    assert commands.build_command(one).count("--workers") == 1


# The scripts, run in a folder with a space, beside stand-ins that write down what they are told. No engine is made.


class Machine:
    """A folder of stand-ins for nvidia-smi and for an interpreter with TensorRT-LLM, first on the PATH."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.bin, self.prepared, self.told = folder / "bin", folder / "an artifact", folder / "told"
        self.bin.mkdir()
        self.prepared.mkdir()
        self.environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "TOLD": str(self.told)}
        self.version, self.capabilities = settings.version, ["9.0"] * settings.gpus
        for name, text in commands.files(settings).items():
            self.write(self.prepared / name, text)
        (self.prepared / ("model" if settings.resolved_mode == "bundle" else "checkpoint")).mkdir()
        self.write(self.bin / "trtllm-build", _FAKE_BUILD)
        self.write(self.bin / "trtllm-serve", '#!/bin/sh\nprintf "%s\\n" "$@" >"$TOLD"\n')

    @staticmethod
    def write(file: Path, text: str) -> None:
        file.write_text(text, encoding="utf-8")
        file.chmod(0o755)

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        cases = "".join(f"--id={n}) echo {each};; " for n, each in enumerate(self.capabilities))
        everything = "echo '" + "\n".join(self.capabilities) + "'" if self.capabilities else "exit 9"
        self.write(self.bin / "nvidia-smi", f"#!/bin/sh\ncase $1 in {cases} *) {everything};; esac\n")
        executable = self.bin / "python3"
        says = f'case "$2" in *executable*) echo {executable};; *) echo {self.version};; esac'
        self.write(executable, f"#!/bin/sh\n{says}\n")
        return subprocess.run(
            [self.prepared / script, *arguments], env=self.environment, capture_output=True, text=True, check=False
        )

    @property
    def arguments(self) -> list[str]:
        return self.told.read_text(encoding="utf-8").splitlines()


_FAKE_BUILD = """\
#!/bin/sh
printf '%s\\n' "$@" >"$TOLD"
while [ "$1" != --output_dir ]; do shift; done
mkdir "$2" && echo '{}' >"$2/config.json"
for rank in ${RANKS-0}; do echo 'no engine' >"$2/rank$rank.engine"; done
"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, sized(mode="engine", gpu="H100"))


def test_build_sh_builds_what_lies_beside_it(machine: Machine) -> None:
    done = machine.run("build.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{machine.prepared}/engine"
    assert (machine.prepared / "engine" / "rank0.engine").is_file()
    told = flags(machine.arguments)
    assert told["--checkpoint_dir"] == f"{machine.prepared}/checkpoint"
    assert told["--output_timing_cache"] == f"{machine.prepared}/timing.cache"


def test_build_sh_gives_the_arguments_of_commands_json(machine: Machine) -> None:
    machine.run("build.sh")
    (command,) = json.loads((machine.prepared / "commands.json").read_text(encoding="utf-8"))["build"]
    folder = str(machine.prepared)
    values = {"checkpoint": f"{folder}/checkpoint", "timing_cache": f"{folder}/timing.cache"}
    wanted = [word.format(engine=f"{folder}/engine.partial", **values) for word in command[1:]]
    assert machine.arguments == wanted


def test_build_sh_writes_into_the_folder_named(machine: Machine, tmp_path: Path) -> None:
    assert machine.run("build.sh", str(tmp_path / "else where")).returncode == 0
    assert (tmp_path / "else where" / "config.json").is_file()


def test_build_sh_into_another_folder_writes_nothing_beside_itself(machine: Machine, tmp_path: Path) -> None:
    """The artifact may be on a disk that cannot be written; a slash at the end is what a shell completes."""
    done = machine.run("build.sh", f"{tmp_path / 'scratch' / 'engine'}/")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scratch" / "engine" / "rank0.engine").is_file()
    assert str(tmp_path / "scratch" / "timing.cache") in done.stderr
    assert not (machine.prepared / "timing.cache").exists()


def test_build_sh_keeps_what_is_there(machine: Machine) -> None:
    assert machine.run("build.sh").returncode == 0
    again = machine.run("build.sh")
    assert again.returncode == 1
    assert "is already there" in again.stderr


def test_build_sh_refuses_another_architecture(machine: Machine) -> None:
    machine.capabilities = ["8.0"]
    done = machine.run("build.sh")
    assert done.returncode == 3
    assert "a GPU here is sm_80, and this was prepared for sm_90" in done.stderr
    assert not machine.told.exists()


def test_build_sh_refuses_another_version(machine: Machine) -> None:
    machine.version = "1.3.0rc27"
    done = machine.run("build.sh")
    assert done.returncode == 3
    assert "TensorRT-LLM is 1.3.0rc27, and this was prepared for 1.2.1" in done.stderr
    assert not machine.told.exists()


def test_build_sh_takes_a_build_of_the_same_version(machine: Machine) -> None:
    machine.version = "1.2.1+cu130"
    assert machine.run("build.sh").returncode == 0


def test_build_sh_looks_at_the_gpus_that_cuda_is_told_to_see(machine: Machine) -> None:
    machine.capabilities = ["8.0", "9.0"]
    assert "a GPU here is sm_80" in machine.run("build.sh").stderr
    machine.environment["CUDA_VISIBLE_DEVICES"] = "1"
    assert machine.run("build.sh").returncode == 0


def test_build_sh_without_a_gpu_says_so_with_the_exit_code_of_a_missing_device(machine: Machine) -> None:
    machine.capabilities = []
    done = machine.run("build.sh")
    assert done.returncode == 3
    assert "no NVIDIA GPU was found" in done.stderr
    assert "hint: " in done.stderr


def test_build_sh_delivers_no_engine_that_is_not_whole(machine: Machine) -> None:
    machine.environment["RANKS"] = ""
    done = machine.run("build.sh")
    assert done.returncode == 1
    assert "trtllm-build wrote no rank0.engine" in done.stderr
    assert not (machine.prepared / "engine").exists()


def test_build_sh_builds_all_ranks_on_one_gpu_and_serve_sh_wants_all(tmp_path: Path) -> None:
    machine = Machine(tmp_path, sized(mode="engine", tensor_parallel=2))
    machine.capabilities, machine.environment["RANKS"] = ["8.9"], "0 1"
    built = machine.run("build.sh")
    assert built.returncode == 0, built.stderr
    served = machine.run("serve.sh")
    assert served.returncode == 3
    assert "2 GPUs are needed, and 1 were found" in served.stderr


def test_serve_sh_serves_the_engines_with_the_tokenizer_beside_them(machine: Machine) -> None:
    assert "bash build.sh" in machine.run("serve.sh").stderr
    machine.run("build.sh")
    machine.environment["PORT"] = "8123"
    done = machine.run("serve.sh", "--host", "0.0.0.0")
    assert done.returncode == 0, done.stderr
    folder = str(machine.prepared)
    assert machine.arguments[0] == f"{folder}/engine"
    assert machine.arguments[-2:] == ["--host", "0.0.0.0"]
    told = flags(machine.arguments)
    assert (told["--tokenizer"], told["--port"]) == (folder, "8123")
    assert told["--extra_llm_api_options"] == f"{folder}/serve.yaml"


def test_serve_sh_of_an_engine_that_is_not_built_names_build_sh(machine: Machine) -> None:
    done = machine.run("serve.sh")
    assert done.returncode == 1
    assert "hint: `bash build.sh` makes it" in done.stderr


def test_serve_sh_of_a_bundle_needs_no_build(tmp_path: Path) -> None:
    machine = Machine(tmp_path, CASES["bundle-fp8-tp4"])
    done = machine.run("serve.sh")
    assert done.returncode == 0, done.stderr
    assert machine.arguments[0] == f"{machine.prepared}/model"
    assert flags(machine.arguments)["--served_model_name"] == "it's a model"
    assert not (machine.prepared / "build.sh").exists()


class Answers(BaseHTTPRequestHandler):
    """A server that is ready at the second look."""

    looks = 0
    asked: list[dict[str, object]] = []  # noqa: RUF012  (one server a test resets it)
    models = b'{"object": "list", "data": [{"id": "model", "object": "model"}]}'

    def do_GET(self) -> None:
        type(self).looks += self.path == "/health"
        self._answer(200 if type(self).looks > 1 else 503, self.models if self.path == "/v1/models" else b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        self._answer(200, b'{"choices": [{"text": "!"}]}' if body["model"] == "model" else b"{}")

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    Answers.looks, Answers.asked = 0, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


def health(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "health.sh"
    script.write_text(commands.scripts(sized())["health.sh"], encoding="utf-8")
    environment = {**os.environ, "no_proxy": "*"}
    return subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_health_sh_waits_and_asks_for_one_token(tmp_path: Path, server: str) -> None:
    done = health(tmp_path, server, "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{server} serves model"
    assert Answers.asked == [{"model": "model", "prompt": "Hello", "max_tokens": 1}]
    assert Answers.looks == 2


def test_health_sh_gives_up_on_a_server_that_is_not_there(tmp_path: Path) -> None:
    done = health(tmp_path, "http://127.0.0.1:9", "0")
    assert done.returncode == 1
    assert "was not ready after 0 s" in done.stderr


def test_health_sh_does_not_take_another_server_for_it(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "models", b"<html>welcome</html>")
    done = health(tmp_path, server, "20")
    assert done.returncode == 1
    assert "lists no models" in done.stderr


def test_naming_the_settings_loads_no_yaml_and_no_torch() -> None:
    code = "import sys, llmopt.compilers.trt_llm.commands; print({'yaml', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


if __name__ == "__main__":
    for case, made in CASES.items():
        (GOLDEN / case).mkdir(parents=True, exist_ok=True)
        for file_name, content in commands.files(made).items():
            (GOLDEN / case / file_name).write_text(content, encoding="utf-8")
