"""Ed25519 keys in files: PEM as OpenSSL writes it (PKCS#8, SubjectPublicKeyInfo), and OpenSSH's own forms.

`cryptography` is imported when a key is first read or made.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt import backends
from llmopt.errors import LlmoptError, SettingsError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

#: Holds the passphrase of a private key: one to be made, and one to be read.
PASSPHRASE = "LLMOPT_SIGN_PASSPHRASE"
_MAKE = "`llmopt store keygen FILE` makes a pair"
_MOST_BYTES = 64 << 10  # of a file with a key


@dataclass(frozen=True)
class PublicKey:
    """`raw` are its 32 bytes; `label` says where it was found, for messages."""

    raw: bytes
    label: str = field(default="", compare=False)

    @cached_property
    def keyid(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the signature of the message is by this key's other half."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class SigningKey:
    private: Ed25519PrivateKey = field(repr=False)
    label: str = ""

    @cached_property
    def public(self) -> PublicKey:
        return PublicKey(self.private.public_key().public_bytes_raw(), self.label)

    def sign(self, message: bytes) -> bytes:
        return self.private.sign(message)


def read_private(file: str | Path) -> SigningKey:
    """The private key in a file, opened with the passphrase in the environment if need be; SettingsError for no key."""
    data = _read(file)
    backends.require("cryptography", extra="sign")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    if b"PUBLIC KEY" in data or data.startswith(b"ssh-"):
        raise SettingsError(f"`{file}` is a public key, which signs nothing", hint="give its private half")
    load = load_ssh_private_key if b"OPENSSH PRIVATE KEY" in data else load_pem_private_key
    try:
        key = _loaded(file, lambda: load(data, None), _no_key(file))
    except TypeError:  # it is encrypted
        passphrase = os.environ.get(PASSPHRASE, "").encode()
        if not passphrase:
            raise SettingsError(f"the key `{file}` needs a passphrase", hint=f"put it into `{PASSPHRASE}`") from None
        wrong = SettingsError(f"`{PASSPHRASE}` does not open the key `{file}`", hint="is it the right passphrase?")
        key = _loaded(file, lambda: load(data, passphrase), wrong)
    if not isinstance(key, Ed25519PrivateKey):
        raise _other_type(file, key)
    return SigningKey(key, str(file))


def read_public(file: str | Path) -> PublicKey:
    """The public key in a file; SettingsError for no such key."""
    data = _read(file)
    backends.require("cryptography", extra="sign")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key

    if b"PRIVATE KEY" in data:
        raise SettingsError(f"`{file}` is a private key", hint="give its public half, and this one to nobody")
    load = load_ssh_public_key if data.startswith(b"ssh-") else load_pem_public_key
    key = _loaded(file, lambda: load(data), _no_key(file))
    if not isinstance(key, Ed25519PublicKey):
        raise _other_type(file, key)
    return PublicKey(key.public_bytes_raw(), str(file))


def generate(file: Path) -> PublicKey:
    """Write a new key into `file`, which only its owner can read, and its public half into `FILE.pub`.

    It is encrypted where there is a passphrase in the environment. What is there already is never overwritten.
    """
    backends.require("cryptography", extra="sign")
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    passphrase = os.environ.get(PASSPHRASE, "").encode()
    lock = forms.BestAvailableEncryption(passphrase) if passphrase else forms.NoEncryption()
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, lock)
    public = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    other = file.with_name(f"{file.name}.pub")
    _create(other, public, 0o644)
    try:
        _create(file, private, 0o600)
    except LlmoptError:
        other.unlink()
        raise
    return PublicKey(key.public_key().public_bytes_raw(), str(other))


def _create(file: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as opened:  # noqa: PTH123 - a mode from the first moment on
            opened.write(data)
            opened.flush()
            os.fsync(descriptor)
    except FileExistsError:
        raise SettingsError(f"`{file}` is there already", hint="name another: a key is never overwritten") from None
    except OSError as error:
        raise LlmoptError(f"`{file}` cannot be written: {error.strerror or error}", hint="name another file") from error


def _read(file: str | Path) -> bytes:
    try:
        with Path(file).open("rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"the key `{file}` cannot be read: {error.strerror or error}", hint=_MAKE) from error
    if len(data) > _MOST_BYTES:
        raise _no_key(file)
    return data


def _loaded(file: str | Path, load: Callable[[], object], broken: SettingsError) -> object:
    """TypeError for a key with a passphrase that was not given."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load()
    except ValueError:
        raise broken from None
    except UnsupportedAlgorithm as error:  # an encrypted key of OpenSSH needs one more package
        raise SettingsError(f"the key `{file}` cannot be used: {error}", hint=_MAKE) from error


def _no_key(file: str | Path) -> SettingsError:
    return SettingsError(f"`{file}` is not a key, or not a whole one", hint=_MAKE)


def _other_type(file: str | Path, key: object) -> SettingsError:
    kind = type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey")
    return SettingsError(f"the key `{file}` is of the type {kind}, not Ed25519", hint=_MAKE)


def trusted_keys(text: str | None) -> tuple[PublicKey, ...]:
    """The public keys in files separated by `:`, as `$LLMOPT_TRUST` has them; read at once."""
    return tuple(read_public(file) for file in (text or "").split(":") if file)
