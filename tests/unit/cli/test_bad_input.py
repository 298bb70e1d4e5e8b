"""What is wrong with an input is said before any work, with a hint and the right exit code."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmopt = Callable[..., Any]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    folder = make_checkpoint("llama", shards=3)
    shutil.copytree(folder, tmp_path / "sharded")
    return tmp_path / "sharded"


def assert_told(ran: Any, code: int, message: str, hint: str) -> None:
    """One message, one hint, nothing on stdout and no trace of torch's own words."""
    assert ran.code == code, ran.err
    lines = ran.error.splitlines()
    assert message in lines[0]
    assert lines[1] == ""
    assert lines[2].startswith("hint: ")
    assert hint in ran.error
    assert ran.out == ""


def header(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(file: Path, entries: dict[str, Any], body: bytes) -> None:
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


COMMANDS = pytest.mark.parametrize("command", ["quantize", "compile", "eval"])


@COMMANDS
def test_a_missing_folder(llmopt: Llmopt, tmp_path: Path, command: str) -> None:
    assert_told(llmopt(command, tmp_path / "none"), 1, "no model folder at", "config.json")


@COMMANDS
def test_a_folder_without_config(llmopt: Llmopt, model: Path, command: str) -> None:
    (model / "config.json").unlink()
    assert_told(llmopt(command, model), 1, "no `config.json` in", "a checkpoint is a folder with config.json")


@COMMANDS
def test_an_empty_folder(llmopt: Llmopt, tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    assert_told(llmopt(command, tmp_path / "empty"), 1, "nothing that llmopt reads is in", "config.json")


@COMMANDS
def test_a_truncated_shard(llmopt: Llmopt, model: Path, command: str) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_told(llmopt(command, model), 1, "is truncated", "again")


@COMMANDS
def test_a_missing_shard(llmopt: Llmopt, sharded: Path, command: str) -> None:
    sorted(sharded.glob("model-*.safetensors"))[1].unlink()
    assert_told(llmopt(command, sharded), 1, "is missing", "again")


@COMMANDS
def test_a_tensor_of_a_wrong_shape(llmopt: Llmopt, model: Path, command: str) -> None:
    entries, body = header(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    entries[name]["shape"] = [64, 256]
    rewrite(model / "model.safetensors", entries, body)
    assert_told(llmopt(command, model), 1, f"`{name}` has the shape [64, 256]", "config.json")


def test_weights_that_are_not_a_number(llmopt: Llmopt, model: Path) -> None:
    entries, body = header(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    begin = entries[name]["data_offsets"][0]
    rewrite(model / "model.safetensors", entries, body[:begin] + b"\xc0\x7f" + body[begin + 2 :])
    ran = llmopt("quantize", model, "--seq-len", 64)
    assert_told(ran, 1, f"`{name}` holds values that are not finite", "damaged")


def test_an_unknown_family(llmopt: Llmopt, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    assert_told(llmopt("quantize", model), 1, "the model type `lama` is not supported", "did you mean `llama`?")


def test_a_width_that_the_group_size_does_not_divide(
    llmopt: Llmopt, make_checkpoint: Callable[..., Path], store: Path
) -> None:
    model = make_checkpoint("llama", hidden_size=96, num_attention_heads=4, head_dim=24, intermediate_size=192)
    ran = llmopt("quantize", model, "--group-size", 128)
    assert_told(ran, 2, "which a group size of 128 does not divide", "`group_size: 32`")
    assert not store.exists()


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--bits", 9], "`bits` cannot be 9", "between 2 and 8"),
        (["--method", "gtpq"], "unknown method `gtpq`", "did you mean `gptq`?"),
        (["--format", "ggml"], "unknown format `ggml`", "`compressed-tensors`"),
        (["--group-size", 48], "`group_size` cannot be 48", "32, 64, 128"),
        (["--method", "awq", "--damping", 0.1], "the method `awq` has no setting `damping`", "belongs to gptq"),
        (["--override", "*.down_proj"], "is not `PATTERN=SETTING:VALUE`", "bits:8,group_size:32"),
        (["--override", "*.down_proj=bitz:8"], "has no setting `bitz`", "did you mean `bits`?"),
        (["--skip", "down_proj"], "no linear of the model matches the pattern `down_proj`", "`*` stands for"),
        (["--profile", "int4-gtpq"], "no profile is named `int4-gtpq`", "did you mean `int4-gptq`?"),
        (["--profile", "none.yaml"], "no pipeline or profile file `none.yaml`", "llmopt profiles ls"),
        (["--calib", "none.txt"], "no text file at `none.txt`", "UTF-8"),
        (["--name", "deadbeef"], "the name `deadbeef` looks like a digest", ""),
    ],
)
def test_settings_that_cannot_be(llmopt: Llmopt, tiny: Path, arguments: list[Any], message: str, hint: str) -> None:
    ran = llmopt("quantize", tiny, *arguments)
    assert_told(ran, 1 if "none" in str(arguments) else 2, message, hint)


def test_an_unknown_setting_is_told_also_where_the_result_is_stored(llmopt: Llmopt, tiny: Path, tmp_path: Path) -> None:
    small = ["--method", "rtn", "--group-size", 32]
    assert llmopt("quantize", tiny, *small).code == 0
    (tmp_path / "p.yaml").write_text("quantize:\n  bitz: 4\n")
    ran = llmopt("quantize", tiny, *small, "--profile", tmp_path / "p.yaml")
    assert_told(ran, 2, "the method `rtn` has no setting `bitz`", "did you mean `bits`?")


def test_an_unknown_target(llmopt: Llmopt, tiny: Path) -> None:
    assert_told(llmopt("compile", tiny, "--target", "openvine"), 2, "unknown target `openvine`", "`openvino`")


def test_calibration_text_that_is_too_short(llmopt: Llmopt, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    ran = llmopt("quantize", tiny, "--group-size", 32, "--seq-len", 128, "--calib", tmp_path / "short.txt")
    assert_told(ran, 1, "calibration text", "")


def test_a_quantized_model_is_not_quantized_again(llmopt: Llmopt, tiny: Path) -> None:
    small = ["--method", "rtn", "--group-size", 32]
    artifact = llmopt("quantize", tiny, *small, "--json").json["artifact"]
    ran = llmopt("quantize", artifact, *small)
    assert_told(ran, 1, "is quantized already", "the checkpoint that it was made from")


def test_an_output_folder_that_cannot_be_made(llmopt: Llmopt, tiny: Path, tmp_path: Path, store: Path) -> None:
    (tmp_path / "file").touch()
    ran = llmopt("quantize", tiny, "--method", "rtn", "--group-size", 32, "--out", tmp_path / "file" / "out")
    assert_told(ran, 2, "lies under a file", "name a folder")
    assert not store.exists()


def test_an_output_folder_with_something_in_it(llmopt: Llmopt, tiny: Path, tmp_path: Path, store: Path) -> None:
    ran = llmopt("quantize", tiny, "--method", "rtn", "--group-size", 32, "--out", tmp_path.parent)
    assert_told(ran, 2, "is not empty", "name a folder")
    assert not store.exists()


def test_a_store_that_cannot_be_written_to(llmopt: Llmopt, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = llmopt("quantize", tiny, "--method", "rtn", "--group-size", 32, "--store", tmp_path / "file" / "store")
    assert_told(ran, 2, "is no folder", "--store")


def test_an_engine_is_asked_for_where_a_model_is_given(llmopt: Llmopt, tiny: Path) -> None:
    for command in ("serve", "bench"):
        assert_told(llmopt(command, tiny), 2, f"`llmopt {command}` takes an engine", "llmopt compile")


def test_a_port_that_is_taken(llmopt: Llmopt, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    for name in (
        "openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.xml", "openvino_detokenizer.xml", "config.json",
        "tokenizer.json",
    ):  # fmt: skip
        (engine / name).write_text("{}")
    about = {
        "schema": "llmopt.engine/1", "target": "openvino", "model_type": "llama", "max_context_tokens": 64, "arch": "x",
        "vocab_size": 8, "eos_token_ids": [0], "properties": {},
    }  # fmt: skip
    (engine / "engine.json").write_text(json.dumps(about))
    config = {
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "num_attention_heads": 1,
        "hidden_size": 8,
        "head_dim": 8,
    }
    (engine / "config.json").write_text(json.dumps(config))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = llmopt("serve", engine, "--port", port)
    assert_told(ran, 1, f"{port}", "--port")


def test_a_server_that_is_not_there(llmopt: Llmopt) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ran = llmopt("bench", f"http://127.0.0.1:{port}")
    assert_told(ran, 1, "cannot reach", "are host and port right?")


def test_bad_input_is_found_without_torch(tiny: Path, tmp_path: Path) -> None:
    """Every check above is quick: none of them loads the library that would do the work."""
    code = (
        "import sys\n"
        "from llmopt.cli.app import main\n"
        f"code = main(['quantize', {str(tiny)!r}, '--seq-len', '100000', '--store', {str(tmp_path)!r}])\n"
        "print(*sys.modules)\n"
        "sys.exit(code)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert not {"torch", "transformers", "openvino"} & set(ran.stdout.split())
