"""Orchestration alone: a stand-in for TensorRT-LLM checks its arguments and misbehaves; what it writes is no engine."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import silent
from llmopt.compilers.trt_llm import build, child, commands, gpu
from llmopt.compilers.trt_llm.build import Prepared, Site, engine_faults, run
from llmopt.compilers.trt_llm.builder import Builder, versions
from llmopt.compilers.trt_llm.settings import Settings
from llmopt.errors import BackendMissingError, CorruptError, Exit, LlmoptError, SettingsError

VERSION = "1.2.1"
ENGINE: dict[str, Any] = {
    "schema": "llmopt.engine/1",
    "target": "tensorrt-llm",
    "mode": "engine",
    "version": VERSION,
    "architecture": "sm_90",
    "gpus": 2,
    "tensor_parallel": 2,
    "pipeline_parallel": 1,
    "quant_algo": "FP8",
}
BUILD = ["trtllm-build", "--checkpoint_dir", "{checkpoint}", "--output_dir", "{engine}"]
CACHE = ["--input_timing_cache", "{timing_cache}", "--output_timing_cache", "{timing_cache}"]
SERVE = [
    "trtllm-serve",
    "{model}",
    "--tokenizer",
    "{prepared}",
    "--config",
    "{prepared}/serve.yaml",
    "--port",
    "{port}",
]
CONFIG = json.dumps(
    {
        "version": VERSION,
        "pretrained_config": {"mapping": {"tp_size": 2, "pp_size": 1}, "quantization": {"quant_algo": "FP8"}},
    }
)
H100 = "{0}, GPU-{0}, NVIDIA H100 80GB HBM3, 81559, 570.86.15, 9.0"
L4 = "{0}, GPU-{0}, NVIDIA L4, 23034, 570.86.15, 8.9"

FAKE_BUILD = """
import json, os, signal, subprocess, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert os.environ["TRTLLM_NO_USAGE_STATS"] == "1"
deed = os.environ.get("DEED", "")
# A worker in a session of its own, as MPI's are.
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("pid", os.getpid(), flush=True)
print("pid", worker.pid, flush=True)
print("visible", os.environ.get("CUDA_VISIBLE_DEVICES"), "in", os.getcwd(), flush=True)
open("model.cache", "w").close()
if deed == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if deed == "fail":
    sys.exit("trtllm-build: error: unrecognized arguments: --no_such_flag")
if deed == "gpu memory":
    print("[TRT] [E] [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (no further information)")
    sys.exit(1)
if deed == "host memory":
    print("concurrent.futures.process.BrokenProcessPool: A process in the process pool was terminated abruptly")
    sys.exit(1)
if deed == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
with open(arguments["--checkpoint_dir"] + "/config.json") as file:
    mapping = json.load(file)["mapping"]
out = arguments["--output_dir"]
for rank in range(1 if deed == "partial" else mapping["tp_size"]):
    with open(f"{out}/rank{rank}.engine", "w") as file:
        file.write("nothing that any runtime would take")
said = {"version": "1.0.0" if deed == "old" else "1.2.1",
        "pretrained_config": {"mapping": mapping, "quantization": {"quant_algo": "FP8"}}}
with open(out + "/config.json", "w") as file:
    json.dump(said, file)
cache = arguments["--output_timing_cache"]
before = open(cache).read() if os.path.exists(cache) else ""
with open(cache, "w") as file:
    file.write(before + "timed;")
"""

FAKE_SERVE = """
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
assert os.environ["TRTLLM_NO_USAGE_STATS"] == "1"
deed = os.environ.get("DEED", "")
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("pid", os.getpid(), flush=True)
print("pid", worker.pid, flush=True)
model, arguments = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert os.path.isfile(arguments["--config"]) and os.path.isdir(model)
assert os.path.isfile(arguments["--tokenizer"] + "/tokenizer.json")
open("left-behind", "w").close()
if deed == "gpu memory":
    sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
if deed == "hang":
    time.sleep(600)
began = time.monotonic()

class Handler(BaseHTTPRequestHandler):
    def reply(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        if self.path == "/health":
            self.reply(200 if time.monotonic() - began > 0.3 else 503, {})
        else:
            self.reply(200, {"data": [{"id": "bundle"}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if deed == "error":
            self.reply(500, {"message": "no"})
        elif deed == "dies":
            os._exit(3)
        else:
            assert asked["model"] == "bundle"
            usage = {"completion_tokens": 0 if deed == "mute" else asked["max_tokens"]}
            self.reply(200, {"choices": [{"text": " Paris"}], "usage": usage})
    def log_message(self, *args):
        pass

HTTPServer(("127.0.0.1", int(arguments["--port"])), Handler).serve_forever()
"""


class Machine:
    """A stand-in for a machine with GPUs and an environment with TensorRT-LLM."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        (folder / "bin").mkdir()
        (folder / "env").mkdir()
        self.logs = folder / "logs"
        self.logs.mkdir()
        monkeypatch.setattr(gpu, "_DRIVER_FOLDER", folder / "none")
        monkeypatch.setattr(build, "_HEALTH_INTERVAL_S", 0.1)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        monkeypatch.setenv("TMPDIR", str(self.logs))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        self.gpus(H100, H100)
        self.python = self.environment(VERSION)
        self.script("env/trtllm-build", f"#!{sys.executable}\n{FAKE_BUILD}")
        self.script("env/trtllm-serve", f"#!{sys.executable}\n{FAKE_SERVE}")

    def script(self, name: str, text: str) -> Path:
        file = self.folder / name
        file.write_text(text)
        file.chmod(0o755)
        return file

    def gpus(self, *rows: str) -> None:
        lines = "".join(f"echo '{row.format(number)}'\n" for number, row in enumerate(rows))
        self.script("bin/nvidia-smi", f"#!/bin/sh\n{lines}")

    def environment(self, version: str | None) -> Path:
        """An interpreter that has packages, of which only the metadata and `version.py` may be looked at."""
        site = self.folder / "site"
        for name, told in (("tensorrt_llm", version), ("tensorrt", "10.13.3"), ("torch", "2.9.0")):
            if told is None:
                continue
            info = site / f"{name}-{told}.dist-info"
            info.mkdir(parents=True, exist_ok=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {told}\n")
            (site / name).mkdir(exist_ok=True)
            (site / name / "__init__.py").write_text("raise RuntimeError('it was imported')\n")
        (site / "torch" / "version.py").write_text("__version__ = '2.9.0'\ncuda = '13.0'\n")
        return self.script("env/python", f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')

    def prepared(self, **changes: Any) -> Path:
        folder = self.folder / "prepared"
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "model").mkdir()
        (folder / "serve.yaml").write_text("{}\n")
        (folder / "tokenizer.json").write_text("{}\n")
        engine = ENGINE | changes
        mapping = {"tp_size": engine["tensor_parallel"], "pp_size": engine["pipeline_parallel"]}
        (folder / "checkpoint" / "config.json").write_text(json.dumps({"mapping": mapping}))
        (folder / "engine.json").write_text(json.dumps(engine))
        commands = {"build": [[*BUILD, *CACHE]] if engine["mode"] == "engine" else [], "serve": SERVE}
        (folder / "commands.json").write_text(json.dumps(commands))
        return folder

    def run(self, prepared: Path | None = None, *, deed: str = "", timeout_s: float = 30, **options: Any) -> Any:
        self._monkeypatch.setenv("DEED", deed)
        self.out = self.folder / "out"
        self.out.mkdir()
        builder = options.pop("builder", Builder.parse(str(self.python)))
        builder = dataclasses.replace(builder, timeout_s=timeout_s, timing_cache=options.pop("timing_cache", None))
        prepared = prepared or self.prepared()
        self.site = Site.find(prepared, builder)
        return run(self.site, self.out, progress=options.pop("progress", silent), **options)

    def log(self) -> str:
        """That of a build that failed."""
        (file,) = self.logs.glob("llmopt-build-*.log")
        return file.read_text()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def is_running(pid: int) -> bool:
    """False for a zombie too: nobody may be there to reap an orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids_in(log: str) -> list[int]:
    found = [int(pid) for pid in re.findall(r"^pid (\d+)$", log, re.MULTILINE)]
    assert len(found) == 2
    return found


def until(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 15
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return condition()


def test_a_build_leaves_the_ranks_the_timing_cache_and_its_log(machine: Machine) -> None:
    said: list[str] = []
    machine.run(progress=lambda line, /, **facts: said.append(line))
    files = sorted(str(file.relative_to(machine.out)) for file in machine.out.rglob("*") if file.is_file())
    assert files == ["build.log", "engine/config.json", "engine/rank0.engine", "engine/rank1.engine", "timing.cache"]
    assert not list(machine.logs.iterdir())
    log = (machine.out / "build.log").read_text()
    assert log.startswith(f"$ {machine.python.parent / 'trtllm-build'} --checkpoint_dir")
    assert said[0] == "running trtllm-build"
    assert "visible None" in log
    assert any(line.startswith("visible None") for line in said)
    assert not any(is_running(pid) for pid in pids_in(log))
    assert machine.site.versions["tensorrt_llm"] == VERSION
    assert [device.architecture for device in machine.site.gpus] == ["sm_90", "sm_90"]


@pytest.mark.parametrize("mode", ["engine", "bundle"])
def test_commands_run_outside_the_artifact(machine: Machine, mode: str) -> None:
    prepared = machine.prepared(mode=mode)
    before = sorted(prepared.rglob("*"))
    machine.run(prepared)
    assert sorted(prepared.rglob("*")) == before
    assert not list(machine.out.rglob("model.cache"))
    assert not list(machine.out.rglob("left-behind"))


def test_a_timing_cache_is_taken_up_and_gone_on_with(machine: Machine) -> None:
    earlier = machine.folder / "earlier.cache"
    earlier.write_text("known;")
    machine.run(timing_cache=earlier)
    assert (machine.out / "timing.cache").read_text() == "known;timed;"
    assert earlier.read_text() == "known;"


def test_the_module_is_run_where_there_is_no_script(machine: Machine) -> None:
    (machine.folder / "env" / "trtllm-build").unlink()
    commands = machine.folder / "site" / "tensorrt_llm" / "commands"
    commands.mkdir()
    (commands.parent / "__init__.py").write_text("")
    (commands / "build.py").write_text(FAKE_BUILD)
    machine.run()
    assert f"$ {machine.python} -m tensorrt_llm.commands.build" in (machine.out / "build.log").read_text()


def test_a_failure_shows_the_last_lines_and_keeps_the_log(machine: Machine) -> None:
    with pytest.raises(LlmoptError, match=r"^`trtllm-build` failed \(exit code 1\)$") as caught:
        machine.run(deed="fail")
    hint = caught.value.hint or ""
    assert "unrecognized arguments: --no_such_flag" in hint
    assert str(next(machine.logs.glob("*.log"))) in hint
    assert "--no_such_flag" in machine.log()
    assert not (machine.out / ".work").exists()


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("gpu memory", r"^`trtllm-build` ran out of GPU memory \(exit code 1\)$"),
        ("host memory", r"^`trtllm-build` was killed, as by a system that ran out of memory \(exit code 1\)$"),
        ("killed", r"^`trtllm-build` was killed, as by a system that ran out of memory \(killed by SIGKILL\)$"),
    ],
)
def test_running_out_of_memory_is_recognised(machine: Machine, deed: str, message: str) -> None:
    with pytest.raises(LlmoptError, match=message) as caught:
        machine.run(deed=deed)
    assert "a smaller `max_num_tokens`" in (caught.value.hint or "")
    assert "the last lines of its log" in (caught.value.hint or "")
    assert not any(is_running(pid) for pid in pids_in(machine.log()))


@pytest.mark.parametrize(
    ("deed", "fault"), [("partial", "`rank1.engine` is missing"), ("old", "says `version` 1.0.0, not 1.2.1")]
)
def test_success_without_engines_is_not_believed(machine: Machine, deed: str, fault: str) -> None:
    with pytest.raises(LlmoptError, match=r"^the build left no usable engine: ") as caught:
        machine.run(deed=deed)
    assert fault in caught.value.message
    assert "the last lines of its log" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ("{", "cannot be used: JSONDecodeError"),
        ("[]", "cannot be used: TypeError"),
        ('{"version": "1.2.1", "pretrained_config": []}', "cannot be used: TypeError"),
        ('{"version": "1.2.1"}', "cannot be used: KeyError"),
        (None, "cannot be used: FileNotFoundError"),
        (CONFIG, None),
        (CONFIG.replace('"tp_size": 2', '"tp_size": 1'), "says `tp_size` 1, not 2"),
        (CONFIG.replace('"pp_size": 1', '"pp_size": 2'), "says `pp_size` 2, not 1"),
        (CONFIG.replace('"FP8"', "null"), "says `quant_algo` None, not FP8"),
        (CONFIG.replace("1.2.1", "1.2.1+cu13"), None),
    ],
)
def test_the_config_of_an_engine_must_be_of_this_build(machine: Machine, config: str | None, fault: str | None) -> None:
    folder = machine.folder / "engine"
    folder.mkdir()
    for rank in range(2):
        (folder / f"rank{rank}.engine").write_text("not empty")
    if config is not None:
        (folder / "config.json").write_text(config)
    found = engine_faults(folder, Prepared.read(machine.prepared()), VERSION)
    assert (found == []) if fault is None else (fault in found[0] and len(found) == 1)


def test_ranks_that_do_not_belong_and_empty_files_are_faults(machine: Machine) -> None:
    folder = machine.folder / "engine"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG)
    for rank, text in enumerate(["not empty", "", "not empty"]):
        (folder / f"rank{rank}.engine").write_text(text)
    found = engine_faults(folder, Prepared.read(machine.prepared()), VERSION)
    assert found == ["`rank1.engine` is missing or empty", "`rank2.engine` is of no rank"]


@pytest.mark.parametrize("mode", ["engine", "bundle"])
def test_a_time_out_ends_every_process(machine: Machine, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_GRACE_S", 0.2)
    with pytest.raises(LlmoptError, match=r"(was ended after|was not healthy within) 3 s") as caught:
        machine.run(machine.prepared(mode=mode), deed="hang", timeout_s=3)
    assert caught.value.code is Exit.ERROR
    assert not any(is_running(pid) for pid in pids_in(machine.log()))


DRIVER = """
import signal, sys
from pathlib import Path
from llmopt.artifacts.outcome import silent
from llmopt.cli.app import _terminated
from llmopt.compilers.trt_llm import child
from llmopt.compilers.trt_llm.build import Site, run
from llmopt.compilers.trt_llm.builder import Builder
child._GRACE_S = 0.3
signal.signal(signal.SIGTERM, _terminated)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
try:
    run(Site.find(Path(sys.argv[1]), Builder.parse(sys.argv[3])), Path(sys.argv[2]), progress=silent)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("mode", ["engine", "bundle"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_process_behind(
    machine: Machine, mode: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEED", "hang")
    monkeypatch.setenv("PYTHONPATH", str(Path(build.__file__).parents[3]))
    out = machine.folder / "out"
    out.mkdir()
    arguments = [str(machine.prepared(mode=mode)), str(out), str(machine.python)]
    parent = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], stderr=subprocess.PIPE)
    try:
        assert until(lambda: any("pid" in log.read_text() for log in machine.logs.glob("*.log")))
        assert until(lambda: machine.log().count("pid ") == 2)
        pids = pids_in(machine.log())
        assert all(is_running(pid) for pid in pids)
        parent.send_signal(number)
        _, errors = parent.communicate(timeout=15)
    finally:
        parent.kill()
        parent.wait()
    assert parent.returncode == (-9 if number is signal.SIGKILL else 130), errors.decode()
    assert until(lambda: not any(is_running(pid) for pid in pids))
    assert machine.log()  # it is kept


def test_a_bundle_is_served_once(machine: Machine) -> None:
    observed = machine.run(machine.prepared(mode="bundle"))
    assert (observed["model"], observed["text"], observed["completion_tokens"]) == ("bundle", " Paris", 8)
    assert isinstance(observed["ready_s"], float)
    assert [file.name for file in machine.out.iterdir()] == ["build.log"]
    assert not any(is_running(pid) for pid in pids_in((machine.out / "build.log").read_text()))


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("gpu memory", r"^`trtllm-serve` ran out of GPU memory \(exit code 1\)$"),
        ("error", "^`trtllm-serve` gave no completion: .*500"),
        ("mute", "^`trtllm-serve` gave no completion: .*no tokens"),
        ("dies", r"^`trtllm-serve` failed \(exit code 3\)$"),
    ],
)
def test_a_bundle_that_does_not_answer_is_an_error(machine: Machine, deed: str, message: str) -> None:
    with pytest.raises(LlmoptError, match=message):
        machine.run(machine.prepared(mode="bundle"), deed=deed)
    assert not any(is_running(pid) for pid in pids_in(machine.log()))


def refusal(machine: Machine, **changes: Any) -> BackendMissingError:
    with pytest.raises(BackendMissingError) as caught:
        machine.run(machine.prepared(**changes))
    assert not list(machine.out.iterdir())
    assert not list(machine.logs.iterdir())  # nothing ran
    return caught.value


def test_without_a_gpu_it_says_what_was_probed(machine: Machine) -> None:
    (machine.folder / "bin" / "nvidia-smi").unlink()
    error = refusal(machine)
    assert error.message.startswith("no NVIDIA GPU was found, and this needs 1 GPU of `sm_90`: `nvidia-smi` is not")
    assert "llmopt compile --resume" in (error.hint or "")
    assert error.code is Exit.BACKEND_MISSING


def test_another_architecture_is_refused(machine: Machine) -> None:
    machine.gpus(L4)
    assert refusal(machine).message == "it was prepared for `sm_90`, and here is 1 x NVIDIA L4 (sm_89)"


def test_an_artifact_for_any_architecture_takes_any(machine: Machine) -> None:
    machine.gpus(L4)
    machine.run(machine.prepared(architecture=None))
    assert [device.name for device in machine.site.gpus] == ["NVIDIA L4"]


def test_serving_needs_a_gpu_for_each_rank(machine: Machine) -> None:
    machine.gpus(H100, L4)
    message = refusal(machine, mode="bundle").message
    assert message.startswith("this needs 2 GPUs of `sm_90`, and here are 1: 1 x NVIDIA H100")


def test_one_gpu_builds_all_ranks(machine: Machine) -> None:
    machine.gpus(H100)
    machine.run()
    assert (machine.out / "engine" / "rank1.engine").is_file()


def test_a_mixed_machine_shows_the_build_its_gpus_only(machine: Machine) -> None:
    machine.gpus(L4, H100)
    machine.run()
    assert "visible GPU-1 in" in (machine.out / "build.log").read_text()
    assert [device.uuid for device in machine.site.gpus] == ["GPU-1"]


def test_another_version_is_refused(machine: Machine) -> None:
    error = refusal(machine, version="1.1.0")
    assert error.message.startswith("it was prepared for TensorRT-LLM `1.1.0`, and `python:")
    assert error.message.endswith("has `1.2.1`")


def test_what_a_build_of_a_version_appends_does_not_matter(machine: Machine) -> None:
    shutil.rmtree(machine.folder / "site" / f"tensorrt_llm-{VERSION}.dist-info")
    machine.environment(f"{VERSION}+cu13")
    machine.run()
    assert machine.site.versions["tensorrt_llm"] == f"{VERSION}+cu13"


def test_versions_are_asked_without_importing_anything(machine: Machine) -> None:
    assert versions(Builder.parse(str(machine.python))) == {
        "tensorrt_llm": VERSION,
        "tensorrt": "10.13.3",
        "torch": "2.9.0",
        "transformers": versions(Builder.parse(str(machine.python)))["transformers"],
        "cuda": "13.0",
        "python": sys.version.split()[0],
    }


def test_a_package_that_was_never_installed_tells_its_version(machine: Machine) -> None:
    site = machine.folder / "site"
    shutil.rmtree(site / f"tensorrt_llm-{VERSION}.dist-info")
    (site / "tensorrt_llm" / "version.py").write_text("__version__ = '1.3.0rc5'\n")
    assert versions(Builder.parse(str(machine.python)))["tensorrt_llm"] == "1.3.0rc5"


def test_an_environment_without_tensorrt_llm_is_refused() -> None:
    with pytest.raises(BackendMissingError, match="has no tensorrt_llm"):
        versions(Builder.parse(sys.executable))


def test_a_program_that_is_no_python_is_told(machine: Machine) -> None:
    with pytest.raises(LlmoptError, match="does not answer as a Python does"):
        versions(Builder.parse("/bin/echo"))
    with pytest.raises(LlmoptError, match="failed with exit code 1"):
        versions(Builder.parse("/bin/false"))
    slow = machine.script("slow", "#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(LlmoptError, match=r"did not answer within 0\.2 s"):
        versions(Builder.parse(f"python:{slow}"), timeout_s=0.2)


def test_a_builder_is_an_interpreter_or_an_image(machine: Machine) -> None:
    python = machine.python
    assert Builder.parse(f"python:{python}") == Builder.parse(str(python)) == Builder(kind="python", name=str(python))
    assert Builder.parse("nvidia-smi").name == str(machine.folder / "bin" / "nvidia-smi")  # on the PATH
    for missing in ("python:/no/such/python", "no-such-python", ""):
        with pytest.raises(SettingsError, match=r"is no program|named by nothing"):
            Builder.parse(missing)
    (python.parent / "bin").mkdir()
    (python.parent / "bin" / "python").symlink_to(python)
    with pytest.raises(SettingsError, match="is a folder") as caught:
        Builder.parse(str(python.parent))
    assert caught.value.hint == f"did you mean `{python.parent / 'bin' / 'python'}`?"
    with pytest.raises(SettingsError, match="names no image"):
        Builder.parse("docker:")
    assert Builder.parse(str(python.parent / "bin" / "python")).name.endswith("env/bin/python")  # the link itself


FAKE_DOCKER = """
import json, os, subprocess, sys
words = sys.argv[1:]
with open(os.environ["DOCKER_LOG"], "a") as file:
    file.write(json.dumps(words) + "\\n")
if words[:2] == ["image", "inspect"]:
    if words[-1] != "ngc/trt:1":
        sys.exit("Error: No such image: " + words[-1])
    print("sha256:0123")
elif words[0] == "run":
    place = words.index("ngc/trt:1")
    command = words[place + 1:]
    mounts = {}
    for option, value in zip(words[:place], words[1:place]):
        if option == "--mount":
            fields = dict(field.partition("=")[::2] for field in value.split(","))
            mounts[fields["target"]] = fields["source"]
        if option == "--env":
            os.environ.__setitem__(*value.split("=", 1))
    for there, here in mounts.items():
        command = [word.replace(there, here) for word in command]
        if "--workdir" in words:
            os.chdir(words[words.index("--workdir") + 1].replace("/llmopt/out", mounts["/llmopt/out"]))
    print("== NVIDIA banner ==")
    sys.stdout.flush()
    program = os.environ["IMAGE_BIN"] + "/" + command[0].replace("python3", "python")
    sys.exit(subprocess.run([program, *command[1:]]).returncode)
"""


@pytest.fixture
def docker(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """A stand-in for docker that runs on this machine what it is told; returns its invocations."""
    log = machine.folder / "docker.log"
    machine.script("bin/docker", f"#!{sys.executable}\n{FAKE_DOCKER}")
    monkeypatch.setenv("DOCKER_LOG", str(log))
    monkeypatch.setenv("IMAGE_BIN", str(machine.python.parent))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


def test_a_container_sees_the_artifact_read_only_and_runs_as_the_user(
    machine: Machine, docker: Callable[[], list[list[str]]]
) -> None:
    machine.run(builder=Builder.parse("docker:ngc/trt:1"))
    assert machine.site.versions["image"] == "sha256:0123"
    assert (machine.out / "engine" / "rank1.engine").is_file()
    words = docker()[-1]
    prepared = machine.folder / "prepared"
    assert f"type=bind,source={prepared},target=/llmopt/prepared,readonly" in words
    assert f"type=bind,source={machine.out},target=/llmopt/out" in words
    assert words[words.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    assert words[words.index("--gpus") + 1] == "all"
    assert words[words.index("ngc/trt:1") + 1 :] == [
        *("trtllm-build", "--checkpoint_dir", "/llmopt/prepared/checkpoint", "--output_dir", "/llmopt/out/engine"),
        *("--input_timing_cache", "/llmopt/out/timing.cache", "--output_timing_cache", "/llmopt/out/timing.cache"),
    ]
    assert ["rm", "--force"] not in [call[:2] for call in docker()]


def test_a_container_is_removed_when_its_command_was_ended(
    machine: Machine, docker: Callable[[], list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_GRACE_S", 0.2)
    with pytest.raises(LlmoptError, match="was ended after"):
        machine.run(builder=Builder.parse("docker:ngc/trt:1"), deed="hang", timeout_s=3)
    *_, ran, removed = docker()
    assert removed == ["rm", "--force", ran[ran.index("--name") + 1]]


def test_an_image_that_is_not_here_is_not_fetched_in_silence(
    machine: Machine, docker: Callable[[], list[list[str]]]
) -> None:
    with pytest.raises(LlmoptError, match="No such image") as caught:
        versions(Builder.parse("docker:ngc/trt:2"))
    assert caught.value.hint == "`docker pull ngc/trt:2`"


def test_docker_that_is_not_installed_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(machine.folder / "bin"))
    with pytest.raises(BackendMissingError, match="`docker` is not installed"):
        Builder.parse("docker:ngc/trt:1")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("engine.json", "{", "is not JSON"),
        ("engine.json", json.dumps(ENGINE | {"mode": "both"}), "`both` is none of engine, bundle"),
        ("engine.json", json.dumps({key: ENGINE[key] for key in ("schema", "target", "mode")}), "version"),
        ("commands.json", "[]", "is no JSON object"),
        ("commands.json", json.dumps({"build": [], "serve": SERVE}), "there is no command to build it"),
        ("commands.json", json.dumps({"build": [["rm", "-rf"]], "serve": SERVE}), "`rm` is none of"),
        ("commands.json", json.dumps({"build": [[*BUILD, "{home}"]], "serve": SERVE}), "`{home}` is none of"),
    ],
)
def test_a_damaged_artifact_is_refused(machine: Machine, file: str, text: str, message: str) -> None:
    prepared = machine.prepared()
    (prepared / file).write_text(text)
    with pytest.raises(CorruptError, match=message):
        Prepared.read(prepared)


@pytest.mark.parametrize(("version", "mode"), [("1.2.1", "engine"), ("1.2.1", "bundle"), ("0.21.0", "engine")])
def test_the_commands_that_are_prepared_can_be_run(machine: Machine, version: str, mode: Any) -> None:
    prepared = machine.prepared(mode=mode, version=version)
    settings = Settings(version=version, mode=mode, tensor_parallel=2, max_input_len=512, max_seq_len=1024)
    (prepared / "commands.json").write_text(commands.files(settings)["commands.json"])
    read = Prepared.read(prepared)
    assert [command[0] for command in read.build] == (["trtllm-build"] if mode == "engine" else [])
    assert read.serve[0] == "trtllm-serve"


def test_a_folder_of_another_kind_is_refused(machine: Machine) -> None:
    with pytest.raises(LlmoptError, match="cannot be read"):
        Prepared.read(machine.folder)
    (machine.folder / "engine.json").write_text('{"schema": "llmopt.engine/1", "target": "openvino"}')
    with pytest.raises(LlmoptError, match="is not prepared for TensorRT-LLM"):
        Prepared.read(machine.folder)
