"""Keys, signatures and the demand for them, as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmopt = Callable[..., Any]
SMALL = ("--method", "rtn", "--group-size", 32)


@pytest.fixture
def key(llmopt: Llmopt, tmp_path: Path) -> Path:
    assert llmopt("store", "keygen", tmp_path / "key").code == 0
    return tmp_path / "key"


@pytest.fixture
def public(key: Path) -> Path:
    return key.with_name("key.pub")


def test_keygen_says_what_it_wrote_and_the_id(llmopt: Llmopt, tmp_path: Path) -> None:
    ran = llmopt("store", "keygen", tmp_path / "key", "--json").json
    assert (ran["private"], ran["public"]) == (str(tmp_path / "key"), str(tmp_path / "key.pub"))
    assert len(ran["keyid"]) == 64
    again = llmopt("store", "keygen", tmp_path / "key")
    assert (again.code, "is there already" in again.err) == (2, True)


def test_an_artifact_is_refused_until_it_is_signed(llmopt: Llmopt, tiny: Path, key: Path, public: Path) -> None:
    llmopt("quantize", tiny, *SMALL, "--name", "tiny")
    refused = llmopt("store", "verify", "tiny", "--require-signed-by", public)
    assert refused.code == 4
    assert f"no valid signature by `{public}`: it is not signed" in refused.out
    assert "0 of 1 artifacts are whole and signed" in refused.out
    signed = llmopt("store", "sign", "tiny", "--key", key, "--json").json
    assert signed["envelope"]["signatures"][0]["keyid"] == signed["keyid"]
    verified = llmopt("store", "verify", "--require-signed-by", public)
    assert (verified.code, verified.out) == (0, "1 of 1 artifacts are whole and signed\n")
    assert len(llmopt("store", "show", "tiny", "--json").json["attestations"]) == 1


def test_one_of_several_keys_is_enough_and_another_is_not(
    llmopt: Llmopt, tiny: Path, key: Path, public: Path, tmp_path: Path
) -> None:
    llmopt("store", "keygen", tmp_path / "other")
    other = tmp_path / "other.pub"
    llmopt("quantize", tiny, *SMALL, "--sign-key", key)
    assert llmopt("store", "verify", "--require-signed-by", other).code == 4
    assert llmopt("store", "verify", "--require-signed-by", other, "--require-signed-by", public).code == 0


def test_what_is_made_is_signed_with_the_key_of_the_environment(
    llmopt: Llmopt, tiny: Path, key: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOPT_SIGN_KEY", str(key))
    artifact = llmopt("quantize", tiny, *SMALL, "--json").json["artifact"]
    assert llmopt("eval", artifact, "--windows", 1, "--seq-len", 16, "--name", "eval").code == 0
    for reference in (artifact, "eval"):
        assert llmopt("store", "verify", reference, "--require-signed-by", public).code == 0
        assert len(llmopt("store", "show", reference, "--json").json["attestations"]) == 1


def test_a_pipeline_signs_every_stage(llmopt: Llmopt, tiny: Path, key: Path, public: Path, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"model: {tiny}\nquantize: {{method: rtn, group_size: 32}}\neval: {{windows: 1, seq_len: 16}}\n")
    assert llmopt("run", file, "--sign-key", key).code == 0
    ran = llmopt("store", "verify", "--require-signed-by", public)
    assert (ran.code, ran.out) == (0, "2 of 2 artifacts are whole and signed\n")


def test_a_hit_is_told_and_not_signed(llmopt: Llmopt, tiny: Path, key: Path, public: Path) -> None:
    llmopt("quantize", tiny, *SMALL)
    again = llmopt("quantize", tiny, *SMALL, "--sign-key", key)
    assert "found in the store and not signed by your key" in again.err
    assert llmopt("store", "verify", "--require-signed-by", public).code == 4
    llmopt("store", "sign", llmopt("store", "ls", "--json").json["artifacts"][0]["artifact"], "--key", key)
    assert "not signed" not in llmopt("quantize", tiny, *SMALL, "--sign-key", key).err


def test_what_is_damaged_is_not_signed(llmopt: Llmopt, tiny: Path, key: Path, store: Path) -> None:
    artifact = llmopt("quantize", tiny, *SMALL, "--json").json["artifact"]
    blob = max((path for path in (store / "blobs").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(bytes(data))
    assert llmopt("store", "sign", artifact, "--key", key).code == 4


def test_what_nobody_stated_is_not_signed(llmopt: Llmopt, tiny: Path, key: Path, store: Path) -> None:
    artifact = llmopt("quantize", tiny, *SMALL, "--json").json["artifact"]
    for file in (store / "attestations").rglob("*.json"):
        file.unlink()
    ran = llmopt("store", "sign", artifact, "--key", key)
    assert (ran.code, "nothing in the store says how" in ran.err) == (1, True)


@pytest.mark.parametrize(
    "command",
    [
        ("store", "verify", "--require-signed-by"),
        ("store", "sign", "x", "--key"),
        ("quantize", "no-such-model", "--sign-key"),
        ("compile", "no-such-model", "--sign-key"),
        ("run", "no-such-pipeline", "--sign-key"),
        ("eval", "no-such-model", "--sign-key"),
        ("bench", "no-such-engine", "--sign-key"),
        ("bench", "calibrate", "no-such-engine", "--sign-key"),
        ("bench", "import", "no-such-file", "--sign-key"),
    ],
    ids=" ".join,
)
def test_a_key_that_is_none_is_found_before_anything_else(
    llmopt: Llmopt, tmp_path: Path, command: tuple[str, ...]
) -> None:
    for file in (tmp_path / "none", tmp_path):
        ran = llmopt(*command, file)
        assert ran.code == 2
        assert ran.error.startswith(f"error: the key `{file}` cannot be read")


def test_without_a_key_nothing_is_signed(llmopt: Llmopt) -> None:
    ran = llmopt("store", "sign", "x")
    assert (ran.code, "keygen" in ran.error) == (2, True)


def test_a_signed_hit_without_a_key_loads_nothing_for_it(llmopt: Llmopt, tiny: Path, key: Path, store: Path) -> None:
    arguments = ["quantize", str(tiny), "--method", "rtn", "--group-size", "32", "--json"]
    llmopt(*arguments, "--sign-key", key)
    code = (
        "import sys\n"
        "from llmopt.cli.app import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "sys.exit('cryptography' in sys.modules or 'torch' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, json.loads(ran.stdout)["cached"]) == (0, True), ran.stderr
