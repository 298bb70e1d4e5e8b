"""A key comes out of the file that it was written to; whatever else is in a file is an error with a hint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from llmopt.artifacts.trust.keys import PASSPHRASE, generate, read_private, read_public
from llmopt.errors import BackendMissingError, LlmoptError, SettingsError

PKCS8, SSH = forms.PrivateFormat.PKCS8, forms.PrivateFormat.OpenSSH


def private(key: object, form: forms.PrivateFormat = PKCS8, passphrase: bytes | None = None) -> bytes:
    assert isinstance(key, ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
    lock = forms.NoEncryption() if passphrase is None else forms.BestAvailableEncryption(passphrase)
    return key.private_bytes(forms.Encoding.PEM, form, lock)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "key"


def test_a_pair_signs_and_verifies(file: Path) -> None:
    made = generate(file)
    key, public = read_private(file), read_public(f"{file}.pub")
    assert key.public == public == made
    assert public.verifies(key.sign(b"message"), b"message")
    assert not public.verifies(key.sign(b"message"), b"other")
    assert "private" not in repr(key)


def test_only_the_owner_can_read_a_new_key(file: Path) -> None:
    generate(file)
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("there", ["key", "key.pub"])
def test_nothing_is_overwritten_and_no_half_of_a_pair_left(file: Path, there: str) -> None:
    file.with_name(there).write_text("mine")
    with pytest.raises(SettingsError, match=f"{there}` is there already"):
        generate(file)
    assert [(path.name, path.read_text()) for path in file.parent.iterdir()] == [(there, "mine")]


def test_a_folder_that_is_not_there_is_told(file: Path) -> None:
    with pytest.raises(LlmoptError, match="cannot be written: No such file"):
        generate(file.parent / "none" / "key")


def test_openssl_reads_what_is_written(file: Path) -> None:
    generate(file)
    for command in (["-in", str(file)], ["-pubin", "-in", f"{file}.pub"]):
        ran = subprocess.run(["openssl", "pkey", *command, "-noout", "-text"], capture_output=True, text=True)
        assert "ED25519" in ran.stdout.upper(), ran.stderr


class TestAPassphrase:
    @pytest.fixture(autouse=True)
    def locked(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(PASSPHRASE, "open sesame")
        generate(file)

    def test_opens_the_key_that_was_made_with_it(self, file: Path) -> None:
        assert b"ENCRYPTED" in file.read_bytes()
        assert read_private(file).public == read_public(f"{file}.pub")

    def test_that_is_missing_is_told(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(PASSPHRASE)
        with pytest.raises(SettingsError, match="needs a passphrase") as caught:
            read_private(file)
        assert PASSPHRASE in str(caught.value.hint)

    def test_that_is_wrong_is_told(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(PASSPHRASE, "open barley")
        with pytest.raises(SettingsError, match=f"`{PASSPHRASE}` does not open"):
            read_private(file)

    def test_that_a_key_does_not_need_is_no_error(self, file: Path) -> None:
        file.write_bytes(private(ed25519.Ed25519PrivateKey.generate()))
        read_private(file)


def test_keys_of_openssh_are_taken(file: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    file.write_bytes(private(key, SSH))
    public = key.public_key().public_bytes(forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH)
    file.with_name("key.pub").write_bytes(public + b" me@here\n")
    assert read_private(file).public == read_public(f"{file}.pub")


KEYS: dict[str, Callable[[], bytes]] = {
    "rsa": lambda: private(rsa.generate_private_key(65537, 2048)),
    "ec": lambda: private(ec.generate_private_key(ec.SECP256R1())),
    "nothing": lambda: b"",
    "words": lambda: b"not a key at all\n",
    "bytes": lambda: bytes(range(256)) * 4,
    "torn": lambda: private(ed25519.Ed25519PrivateKey.generate())[:60] + b"\n-----END PRIVATE KEY-----\n",
    "torn ssh": lambda: private(ed25519.Ed25519PrivateKey.generate(), SSH)[:100],
    "large": lambda: private(ed25519.Ed25519PrivateKey.generate()) + b"#" * 100_000,
    "certificate": lambda: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
}


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("read", [read_private, read_public])
def test_what_is_no_ed25519_key_is_an_error_with_a_hint(file: Path, kind: str, read: Callable[[Path], object]) -> None:
    file.write_bytes(KEYS[kind]())
    with pytest.raises(SettingsError) as caught:
        read(file)
    assert str(file) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("form", [b"ssh-rsa AAAA", b"ssh-ed25519 AAAA", b"ssh-"])
def test_a_public_key_of_openssh_that_is_none_is_an_error(file: Path, form: bytes) -> None:
    file.write_bytes(form)
    with pytest.raises(SettingsError):
        read_public(file)


@pytest.mark.parametrize("key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())])
def test_a_public_key_of_another_type_is_named(file: Path, key: rsa.RSAPrivateKey) -> None:
    data = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    file.write_bytes(data)
    with pytest.raises(SettingsError, match=r"is of the type (RSA|EC), not Ed25519"):
        read_public(file)


def test_the_halves_are_not_taken_for_one_another(file: Path) -> None:
    generate(file)
    with pytest.raises(SettingsError, match="is a private key"):
        read_public(file)
    with pytest.raises(SettingsError, match="is a public key"):
        read_private(f"{file}.pub")


@pytest.mark.parametrize("read", [read_private, read_public])
def test_a_file_that_is_not_there_or_no_file_is_told(file: Path, read: Callable[[Path], object]) -> None:
    for path in (file, file.parent):
        with pytest.raises(SettingsError, match="cannot be read") as caught:
            read(path)
        assert "keygen" in str(caught.value.hint)


def test_without_the_library_the_extra_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(file)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for work in (lambda: read_private(file), lambda: read_public(f"{file}.pub"), lambda: generate(file)):
        with pytest.raises(BackendMissingError) as caught:
            work()
        assert caught.value.hint == "pip install 'llmopt[sign]'"


def test_the_library_is_not_loaded_before_it_is_used() -> None:
    code = "import sys, llmopt.artifacts.store, llmopt.pipeline.runner; sys.exit('cryptography' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
