"""A tiny engine made by the compiler, and real servers over it, each a process of its own."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

CONTEXT = 8192  # long enough that a full completion takes a second or so
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'nobody' %}{{ raise_exception('nobody speaks') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SCRIPT = textwrap.dedent("""
    import json, sys
    from pathlib import Path
    from llmopt import serve
    from llmopt.errors import LlmoptError
    settings = json.loads(sys.argv[2])
    if "drain_s" in settings:
        import llmopt.serve.server
        llmopt.serve.server.DRAIN_S = settings.pop("drain_s")
    cache = settings.pop("cache_dir", None)
    try:
        serve.serve(Path(sys.argv[1]), host="127.0.0.1", port=0, model_name="tiny", **settings,
                    cache_dir=Path(cache) if cache else None, ready=lambda url: print(url, flush=True))
    except LlmoptError as error:
        sys.exit(f"error: {error.message}")
    except KeyboardInterrupt:
        sys.exit(130)
""")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose greedy text is bytes at random: broken characters, repeats, everything."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the server answers, then the other server answers"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=128,
        vocab_size=len(fast), max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.4,
        bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llmopt import compilers
    from llmopt.artifacts.outcome import silent

    out = tmp_path_factory.mktemp("engine")
    settings = compilers.resolve({"precision": "f32", "activation_group": 0, "aot": False})
    compilers.compile_model(checkpoint, settings, out, silent)
    return out


class Server:
    """A server process; with `wait`, one that takes requests or has ended (`port` 0)."""

    def __init__(self, engine: Path, log: Path, settings: Mapping[str, Any], wait: bool = True) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(engine), json.dumps(settings)], stdout=subprocess.PIPE, stderr=stderr
            )
        assert self.process.stdout is not None
        self.port = 0
        if wait:
            url = self.process.stdout.readline().decode().strip()
            self.port = int(url.rpartition(":")[2] or 0)

    def log(self) -> str:
        return self._log.read_text()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.stdout.close()
        return self.process.wait(20)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of the reply. A dict is sent as JSON, bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    def complete(self, prompt: Any = "the server", **fields: Any) -> Any:
        status, reply = self.request("POST", "/v1/completions", {"prompt": prompt, "temperature": 0} | fields)
        assert status == 200, reply
        return reply

    def stream(self, path: str = "/v1/completions", **fields: Any) -> Stream:
        return Stream(self.port, path, {"temperature": 0, "stream": True} | fields)


class Stream:
    """A streamed reply as it comes in."""

    def __init__(self, port: int, path: str, fields: Mapping[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._connection.request("POST", path, json.dumps(fields))
        self.reply = self._connection.getresponse()
        self.done = False

    def __iter__(self) -> Iterator[Any]:
        while line := self.reply.readline():
            if line == b"data: [DONE]\n":
                self.done = True
            elif line.startswith(b"data: "):
                yield json.loads(line[6:])

    def close(self) -> None:
        self.reply.close()
        self._connection.close()


Start = Callable[..., Server]


@pytest.fixture
def start(engine: Path, tmp_path: Path) -> Iterator[Start]:
    """start(**settings of serve) -> a server of the test's own."""
    servers: list[Server] = []

    def make(folder: Path = engine, *, wait: bool = True, **settings: Any) -> Server:
        servers.append(Server(folder, tmp_path / f"log-{len(servers)}", settings, wait))
        return servers[-1]

    yield make
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
        server.stop()


@pytest.fixture(scope="session")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all the tests that do not end it."""
    running = Server(engine, tmp_path_factory.mktemp("log") / "log", {})
    yield running
    code, log = running.stop(), running.log()
    assert (code, log) == (0, ""), log


@pytest.fixture
def in_background() -> Iterator[Callable[[Callable[[], None]], threading.Thread]]:
    """Start a function in a thread; it is joined when the test ends."""
    threads: list[threading.Thread] = []

    def begin(work: Callable[[], None]) -> threading.Thread:
        threads.append(threading.Thread(target=work))
        threads[-1].start()
        return threads[-1]

    yield begin
    for thread in threads:
        thread.join()
