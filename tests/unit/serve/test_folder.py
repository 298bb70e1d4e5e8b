"""What is checked before anything heavy is loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmopt import serve
from llmopt.errors import BackendMissingError, Exit, LlmoptError, SettingsError
from llmopt.serve.folder import EngineFolder, blocks_for
from llmopt.serve.sockets import bind, url


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "engine"))


def change(folder: Path, **values: Any) -> None:
    file = folder / "engine.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_an_engine_is_fit_to_serve(engine: Path) -> None:
    serve.check(engine, "127.0.0.1", 0)


@pytest.mark.parametrize("name", ["openvino_model.bin", "openvino_tokenizer.xml", "tokenizer.json", "config.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(LlmoptError, match=f"lacks `{name}`"):
        serve.check(copy, "127.0.0.1", 0)


def test_a_checkpoint_is_not_an_engine(checkpoint: Path) -> None:
    with pytest.raises(LlmoptError, match=r"no `engine\.json`") as error:
        serve.check(checkpoint, "127.0.0.1", 0)
    assert "llmopt compile" in str(error.value.hint)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema": "llmopt.engine/9"}, "schema `llmopt.engine/9`"),
        ({"target": "tensorrt-llm"}, "`tensorrt-llm` cannot be served here"),
        ({"max_context_tokens": "many"}, "no usable `max_context_tokens`"),
        ({"properties": None}, "no usable `properties`"),
    ],
)
def test_an_engine_json_that_cannot_be_used_says_why(copy: Path, values: dict[str, Any], message: str) -> None:
    change(copy, **values)
    with pytest.raises(LlmoptError, match=message):
        EngineFolder.read(copy)


def test_a_truncated_engine_json_is_an_error(copy: Path) -> None:
    (copy / "engine.json").write_text('{"schema":')
    with pytest.raises(LlmoptError, match="not valid JSON"):
        EngineFolder.read(copy)


def test_a_taken_port_is_an_error_with_the_way_out(engine: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LlmoptError, match=f"port `{port}` on `127.0.0.1` is taken") as error:
            serve.check(engine, "127.0.0.1", port)
    assert error.value.hint == "`--port 0` takes a free one"
    assert error.value.code == Exit.ERROR


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_is_an_error(engine: Path, host: str) -> None:
    with pytest.raises(LlmoptError, match="not an address of this machine"):
        serve.check(engine, host, 0)


def test_a_port_beyond_the_last_is_a_usage_error(engine: Path) -> None:
    with pytest.raises(SettingsError):
        serve.check(engine, "127.0.0.1", 65536)


def test_a_batch_of_none_is_a_usage_error(engine: Path) -> None:
    with pytest.raises(SettingsError, match="max_batch"):
        serve.serve(engine, host="127.0.0.1", port=0, model_name="m", max_batch=0, ready=print)


@pytest.mark.parametrize("package", ["openvino_genai", "uvicorn"])
def test_a_missing_package_is_named_with_what_installs_it(
    engine: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(BackendMissingError, match=f"`{package}`") as error:
        serve.check(engine, "127.0.0.1", 0)
    assert error.value.hint == "pip install 'llmopt[openvino]'"


def test_the_check_loads_no_runtime(engine: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llmopt import serve\n"
        f"serve.check(Path({str(engine)!r}), '127.0.0.1', 0)\n"
        "heavy = {'openvino', 'openvino_genai', 'torch', 'transformers', 'starlette', 'uvicorn', 'jinja2', 'numpy'}\n"
        "sys.exit(f'loaded: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("host", "expected"), [("0.0.0.0", "http://127.0.0.1:"), ("127.0.0.1", "http://127.0.0.1:")])
def test_the_url_can_be_opened_from_here(host: str, expected: str) -> None:
    with bind(host, 0) as listener:
        assert url(listener).startswith(expected)


def test_the_cache_holds_every_sequence_in_full_where_memory_allows(engine: Path) -> None:
    folder = EngineFolder.read(engine)
    assert folder.kv_blocks(4, 1 << 40) == 4 * blocks_for(folder.max_context_tokens)


def test_the_cache_takes_at_most_half_of_the_memory(engine: Path) -> None:
    folder = EngineFolder.read(engine)
    blocks = folder.kv_blocks(1000, 8 << 20)
    assert (4 << 20) - 40_000 < blocks * 32 * folder.kv_bytes_per_token <= 4 << 20
