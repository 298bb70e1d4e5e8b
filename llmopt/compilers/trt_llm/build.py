"""The build: the commands of a prepared artifact, run where TensorRT-LLM and the GPU are.

Engine mode runs `trtllm-build` and looks at what it left; bundle mode has nothing to build, so it starts
`trtllm-serve`, waits until it is healthy and asks for one completion. Whatever is wrong with the machine is found
before anything runs.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.artifacts.outcome import Json, Progress
from llmopt.compilers.trt_llm.builder import MODULES, Builder, Container, versions
from llmopt.compilers.trt_llm.child import Child, how, last_lines, out_of_memory, running
from llmopt.compilers.trt_llm.commands import PLACEHOLDERS
from llmopt.compilers.trt_llm.gpu import Gpu, Probe, probe
from llmopt.errors import BackendMissingError, CorruptError, LlmoptError

_PLACEHOLDER = re.compile(r"\{[a-z_]+\}")
_PREPARED, _OUT = "/llmopt/prepared", "/llmopt/out"  # in a container
#: So that output comes as it is written, and that nothing is reported to a server (tensorrt_llm/usage, from 1.3 on).
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "TRTLLM_NO_USAGE_STATS": "1"}
_PROMPT, _TOKENS = "The capital of France is", 8
_HEALTH_INTERVAL_S, _REQUEST_TIMEOUT_S = 1.0, 120.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
_SMALLER = (
    "prepare it with a smaller `max_num_tokens` or `max_batch_size`, with a larger `tensor_parallel`, or build with "
    "fewer `workers`; other programs on the machine take memory too"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What engine.json and commands.json of a prepared artifact say, as far as the build needs it."""

    path: Path
    mode: str
    version: str
    architecture: str | None
    tensor_parallel: int
    pipeline_parallel: int
    quant_algo: str | None
    build: tuple[tuple[str, ...], ...]
    serve: tuple[str, ...]

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def gpus(self) -> int:
        """That it takes here: `trtllm-build` can build all ranks on one GPU, serving needs one for each."""
        return 1 if self.mode == "engine" else self.ranks

    @classmethod
    def read(cls, path: Path) -> Prepared:
        """Raises LlmoptError for a folder that is no prepared artifact, CorruptError for a damaged one."""
        path = path.absolute()
        said = _json(path / "engine.json")
        if said.get("schema") != "llmopt.engine/1" or said.get("target") != "tensorrt-llm":
            raise LlmoptError(
                f"`{path}` is not prepared for TensorRT-LLM", hint="`llmopt compile MODEL --target tensorrt-llm`"
            )
        if said.get("status") == "compiled":
            raise LlmoptError(f"`{path}` is built already", hint="its `serve.sh` starts it, where its GPU is")
        commands = _json(path / "commands.json")
        try:
            mode = _one_of(said["mode"], ("engine", "bundle"))
            if mode == "engine" and not commands.get("build"):
                raise ValueError("there is no command to build it")
            return cls(
                path=path,
                mode=mode,
                version=str(said["version"]),
                architecture=said["architecture"],
                tensor_parallel=int(said["tensor_parallel"]),
                pipeline_parallel=int(said["pipeline_parallel"]),
                quant_algo=said.get("quant_algo"),
                build=tuple(_argv(command) for command in commands.get("build", [])),
                serve=_argv(commands["serve"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"`{path}` has no usable engine.json and commands.json: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where an artifact will be built: looked at once, before anything runs.

    gpus: those to use; visible: the environment that shows those only; versions: of the builder's packages.
    """

    artifact: Prepared
    builder: Builder
    gpus: tuple[Gpu, ...]
    visible: Mapping[str, str]
    versions: Mapping[str, str | None]

    @classmethod
    def find(cls, prepared: Path, builder: Builder) -> Site:
        """Raises BackendMissingError where this machine or the builder is not what the artifact needs."""
        artifact = Prepared.read(prepared)
        gpus, visible = refuse_mismatch(artifact, probe())
        found = versions(builder)
        _refuse_version(artifact, builder, found)
        return cls(artifact=artifact, builder=builder, gpus=gpus, visible=visible, versions=found)


def run(site: Site, out: Path, *, progress: Progress) -> dict[str, Json]:
    """Build into the folder `out`: `engine/`, `timing.cache` and `build.log`; for a bundle the log alone.

    Returns what was seen of a bundle's server. While it runs, the log lies outside `out`, and stays there if the build
    fails or is interrupted; the error says where.
    """
    artifact, builder, out = site.artifact, site.builder, out.absolute()
    deadline_s = time.monotonic() + builder.timeout_s
    with _log(out, progress) as log, _work(out) as work:
        place = _Place(artifact, out, builder, work, site.visible)
        if artifact.mode == "bundle":
            return _observe(place, log, progress, deadline_s, builder.timeout_s)
        if builder.timing_cache is not None:
            shutil.copyfile(builder.timing_cache, out / "timing.cache")
        (out / "engine").mkdir()
        for command in artifact.build:
            _build(place, command, log, progress, deadline_s, builder.timeout_s)
        if faults := engine_faults(out / "engine", artifact, str(site.versions["tensorrt_llm"])):
            raise LlmoptError(f"the build left no usable engine: {'; '.join(faults)}", hint=last_lines(log))
    return {}


def refuse_mismatch(artifact: Prepared, found: Probe) -> tuple[tuple[Gpu, ...], Mapping[str, str]]:
    """The GPUs to use, and the environment that shows those only; BackendMissingError where they are not enough."""
    wanted = artifact.architecture
    need = f"{artifact.gpus} GPU{'s' if artifact.gpus > 1 else ''}" + (f" of `{wanted}`" if wanted else "")
    here = "run it on such a machine: `llmopt compile --resume`"
    if not found.gpus:
        raise BackendMissingError(f"no NVIDIA GPU was found, and this needs {need}: {found}", hint=here)
    usable = found.of(wanted)
    if len(usable) >= artifact.gpus:
        uuids = [gpu.uuid for gpu in usable if gpu.uuid]
        mixed = len(usable) < len(found.gpus) and len(uuids) == len(usable)
        return usable, {"CUDA_VISIBLE_DEVICES": ",".join(uuids)} if mixed else {}
    if usable:
        raise BackendMissingError(f"this needs {need}, and here are {len(usable)}: {found}", hint=here)
    hint = f"{here}, or prepare it again for this GPU"
    raise BackendMissingError(f"it was prepared for `{wanted}`, and here is {found}", hint=hint)


def _refuse_version(artifact: Prepared, builder: Builder, found: Mapping[str, str | None]) -> None:
    """Commands and checkpoint are those of one version; what a build of it appends (`+cu13`) does not matter."""
    version = _release(found["tensorrt_llm"])
    if version != artifact.version:
        raise BackendMissingError(
            f"it was prepared for TensorRT-LLM `{artifact.version}`, and `{builder}` has `{version}`",
            hint=f"name an environment that has `{artifact.version}`, or prepare it again for version `{version}`",
        )


def _release(version: object) -> str:
    """Without what a build of it appends."""
    return str(version).partition("+")[0]


def engine_faults(folder: Path, artifact: Prepared, version: str) -> list[str]:
    """What is wrong with the engines in `folder`: one of every rank must be there, and config.json be of this build."""
    wanted = {f"rank{rank}.engine" for rank in range(artifact.ranks)}
    there = {file.name for file in folder.glob("rank*.engine") if file.stat().st_size}
    faults = [f"`{name}` is missing or empty" for name in sorted(wanted - there)]
    faults += [f"`{name}` is of no rank" for name in sorted(there - wanted)]
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = config["pretrained_config"]
        mapping = model["mapping"]
        said = {
            "version": (_release(config["version"]), _release(version)),
            "tp_size": (mapping["tp_size"], artifact.tensor_parallel),
            "pp_size": (mapping["pp_size"], artifact.pipeline_parallel),
            "quant_algo": ((model.get("quantization") or {}).get("quant_algo"), artifact.quant_algo),
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [*faults, f"`config.json` cannot be used: {error!r}"]
    return faults + [
        f"`config.json` says `{name}` {is_}, not {want}" for name, (is_, want) in said.items() if is_ != want
    ]


class _Place:
    """Where commands run: what their placeholders stand for, and what starts them."""

    def __init__(self, artifact: Prepared, out: Path, builder: Builder, work: Path, visible: Mapping[str, str]) -> None:
        self.artifact = artifact
        self.out = out
        self._builder = builder
        self._work = work
        self._environment = {**_ENVIRONMENT, **_told(visible)}

    @contextmanager
    def start(self, command: Sequence[str], log: Path, progress: Progress, *, port: int = 0) -> Iterator[Child]:
        argv = self._builder.argv(self._filled(command, port))
        container = self._container() if self._builder.kind == "docker" else None
        if container is not None:
            argv = container.argv(argv)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(argv)}\n")
        with running(
            argv,
            log,
            progress,
            folder=self._work,
            environment=self._environment,
            cleanup=container.cleanup if container else (),
        ) as child:
            yield child

    def _filled(self, command: Sequence[str], port: int) -> list[str]:
        inside = self._builder.kind == "docker"
        prepared = _PREPARED if inside else str(self.artifact.path)
        out = _OUT if inside else str(self.out)
        values = {
            "{prepared}": prepared,
            "{checkpoint}": f"{prepared}/checkpoint",
            "{engine}": f"{out}/engine",
            "{timing_cache}": f"{out}/timing.cache",
            "{model}": f"{prepared}/model" if self.artifact.mode == "bundle" else f"{out}/engine",
            "{port}": str(port),
        }
        return [_PLACEHOLDER.sub(lambda found: values[found[0]], word) for word in command]

    def _container(self) -> Container:
        return Container(
            image=self._builder.name,
            name=f"llmopt-{os.getpid()}-{os.urandom(4).hex()}",
            folders=[(self.artifact.path, _PREPARED, False), (self.out, _OUT, True)],
            work=f"{_OUT}/{self._work.name}",
            environment=self._environment,
        )


def _told(visible: Mapping[str, str]) -> dict[str, str]:
    """What the environment says of GPUs, told to a container too."""
    names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    return {name: os.environ[name] for name in names if name in os.environ} | dict(visible)


def _build(
    place: _Place, command: Sequence[str], log: Path, progress: Progress, deadline_s: float, timeout_s: float
) -> None:
    progress(f"running {command[0]}")
    with place.start(command, log, progress) as child:
        while (code := child.poll()) is None:
            if time.monotonic() > deadline_s:
                raise LlmoptError(
                    f"`{command[0]}` was ended after {timeout_s:g} s",
                    hint="give it more time; its timing cache is not kept\n" + last_lines(log),
                )
    if code != 0:
        raise _failure(command[0], log, code)


def _failure(name: str, log: Path, code: int) -> LlmoptError:
    words = out_of_memory(log, code)
    if words is None:
        return LlmoptError(f"`{name}` failed ({how(code)})", hint=last_lines(log))
    return LlmoptError(f"`{name}` {words} ({how(code)})", hint=f"{_SMALLER}\n{last_lines(log)}")


def _observe(place: _Place, log: Path, progress: Progress, deadline_s: float, timeout_s: float) -> dict[str, Json]:
    """Serve the bundle, ask once, stop: what was seen."""
    command, port, began_s = place.artifact.serve, _free_port(), time.monotonic()
    url = f"http://localhost:{port}"
    progress(f"starting {command[0]}")
    with place.start(command, log, progress, port=port) as child:
        while not _is_healthy(url):
            if (code := child.poll(_HEALTH_INTERVAL_S)) is not None:
                raise _failure(command[0], log, code)
            if time.monotonic() > deadline_s:
                raise LlmoptError(f"`{command[0]}` was not healthy within {timeout_s:g} s", hint=last_lines(log))
        ready_s = time.monotonic() - began_s
        progress("it is healthy; asking for one completion")
        try:
            answer = _complete(url)
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            code = child.poll(_HEALTH_INTERVAL_S)
            if code is not None:
                raise _failure(command[0], log, code) from None
            raise LlmoptError(f"`{command[0]}` gave no completion: {error!r}", hint=last_lines(log)) from None
    return {"ready_s": round(ready_s, 1), **answer}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _is_healthy(url: str) -> bool:
    try:
        with _OPENER.open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _complete(url: str) -> dict[str, Json]:
    """One greedy completion; LookupError where its answer has no text."""
    with _OPENER.open(f"{url}/v1/models", timeout=_REQUEST_TIMEOUT_S) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": _PROMPT, "max_tokens": _TOKENS, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    began_s = time.monotonic()
    with _OPENER.open(request, timeout=_REQUEST_TIMEOUT_S) as answer:
        said = json.load(answer)
    tokens = int(said["usage"]["completion_tokens"])
    if tokens < 1:
        raise ValueError("its answer has no tokens")
    return {
        "model": model,
        "prompt": _PROMPT,
        "text": said["choices"][0]["text"],
        "completion_tokens": tokens,
        "completion_s": round(time.monotonic() - began_s, 3),
    }


@contextmanager
def _log(out: Path, progress: Progress) -> Iterator[Path]:
    """A log outside `out`, moved into it when all went well; else its place is told."""
    descriptor, name = tempfile.mkstemp(prefix="llmopt-build-", suffix=".log")
    os.close(descriptor)
    log = Path(name)
    try:
        yield log
    except BaseException:
        progress(f"the log is kept: {log}")
        raise
    shutil.move(log, out / "build.log")


@contextmanager
def _work(out: Path) -> Iterator[Path]:
    """The folder that commands run in: what they write beside their results goes with it."""
    folder = out / ".work"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _json(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmoptError(
            f"`{file}` cannot be read: {error.strerror}", hint="`llmopt compile MODEL --target tensorrt-llm` makes it"
        ) from None
    except ValueError as error:
        raise CorruptError(f"`{file}` is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise CorruptError(f"`{file}` is no JSON object")
    return said


def _one_of(value: object, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"`{value}` is none of {', '.join(known)}")
    return str(value)


def _argv(words: object) -> tuple[str, ...]:
    """A command of TensorRT-LLM, with placeholders that are known; ValueError otherwise."""
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"`{words}` is no command")
    _one_of(words[0], tuple(MODULES))
    for word in words:
        for found in _PLACEHOLDER.findall(word):
            _one_of(found, PLACEHOLDERS)
    return tuple(words)
