"""Signed statements: an in-toto Statement in a DSSE envelope, signed with ed25519, and whom to believe it from.

Sources: DSSE v1.0.2, protocol and envelope; in-toto attestation framework, envelope layer v1. A statement says what it
says; only a signature by a key that is trusted makes it worth anything, so nothing here trusts by default.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmopt import backends
from llmopt.artifacts.attestation import PREDICATE_TYPE, STATEMENT_TYPE
from llmopt.artifacts.manifest import MANIFEST_NAME, Manifest, canonical_json
from llmopt.artifacts.outcome import Json
from llmopt.artifacts.trust.keys import PublicKey, SigningKey
from llmopt.errors import CorruptError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_HINT = "sign it with `llmopt store sign ARTIFACT --key FILE`, or make it again with `--sign-key FILE`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Signed:
    """A statement out of an envelope, and the ids of those of the given keys that signed it: one at the least."""

    statement: dict[str, Json]
    keyids: tuple[str, ...]


def sign(statement: Mapping[str, Json], key: SigningKey) -> dict[str, Json]:
    """The envelope of a statement; the same key and statement always give the same one."""
    payload = canonical_json(dict(statement))
    signature: Json = {"keyid": key.public.keyid, "sig": _base64(key.sign(pae(PAYLOAD_TYPE, payload)))}
    return {"payload": _base64(payload), "payloadType": PAYLOAD_TYPE, "signatures": [signature]}


def verify(envelope: Mapping[str, Json], keys: Iterable[PublicKey]) -> Signed:
    """The statement in an envelope that one of the keys has signed, and which of them; CorruptError otherwise.

    A signature with a key's id is tried with that key only, one without an id (which DSSE allows) with each.
    """
    backends.require("cryptography", extra="sign")
    payload, payload_type, signatures = _opened(envelope)
    message = pae(payload_type, payload)
    by_id = {key.keyid: key for key in keys}
    signers = tuple(
        keyid
        for keyid, key in by_id.items()
        if any(named in ("", keyid) and key.verifies(signature, message) for named, signature in signatures)
    )
    if not signers:
        raise CorruptError(_why_not([named for named, _ in signatures], by_id), hint=_HINT)
    return Signed(statement=_statement(payload, payload_type), keyids=signers)


def trusted(manifest: Manifest, envelopes: Iterable[Mapping[str, Json]], keys: Sequence[PublicKey]) -> Signed | None:
    """The first statement about how this artifact was made that one of the keys has signed, if there is one."""
    try:
        return require(manifest, envelopes, keys)
    except CorruptError:
        return None


def require(manifest: Manifest, envelopes: Iterable[Mapping[str, Json]], keys: Sequence[PublicKey]) -> Signed:
    """As `trusted`; CorruptError that says what there is instead, where there is none."""
    reasons = []
    for envelope in envelopes:
        try:
            signed = verify(envelope, keys)
            check_about(signed.statement, manifest)
        except CorruptError as error:
            reasons.append(error.message)
            continue
        return signed
    wanted = " or ".join(f"`{key.label or key.keyid[:16]}`" for key in keys) or "any key"
    found = "; ".join(list(dict.fromkeys(reasons))[:3]) or "it is not signed"
    raise CorruptError(f"the artifact `{manifest.id}` has no valid signature by {wanted}: {found}", hint=_HINT)


def check_about(statement: Mapping[str, Json], manifest: Manifest) -> None:
    """CorruptError unless the statement is SLSA provenance of this artifact, and of the action that made it."""
    if statement.get("predicateType") != PREDICATE_TYPE:
        raise CorruptError("a statement is not about how something was made")
    subjects = statement.get("subject")
    digests = [
        _at(subject, "digest", "sha256")
        for subject in (subjects if isinstance(subjects, list) else [])
        if _at(subject, "name") == MANIFEST_NAME
    ]
    if manifest.hex not in digests:
        raise CorruptError("a statement is about another artifact")
    key = _at(statement, "predicate", "buildDefinition", "internalParameters", "key")
    if manifest.action is not None and key != manifest.action.key:
        raise CorruptError("a statement is about another action")


def is_envelope(value: Mapping[str, Json]) -> bool:
    """Whether what lies beside an artifact is a signed statement and not a bare one."""
    return "payloadType" in value


def unwrap(value: Mapping[str, Json]) -> dict[str, Json]:
    """The statement that is there, in an envelope or bare, whoever wrote it; CorruptError if there is none."""
    if not is_envelope(value):
        return dict(value)
    payload, payload_type, _ = _opened(value)
    return _statement(payload, payload_type)


def pae(payload_type: str, payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding, so that no type can be taken for part of a payload."""
    kind = payload_type.encode(errors="surrogatepass")  # what JSON may bring along matches nothing
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _opened(envelope: Mapping[str, Json]) -> tuple[bytes, str, list[tuple[str, bytes]]]:
    """Payload, its type, and each signature with the id of its key (empty for none)."""
    payload, payload_type, signatures = (envelope.get(name) for name in ("payload", "payloadType", "signatures"))
    if not isinstance(payload, str) or not isinstance(payload_type, str) or not isinstance(signatures, list):
        raise CorruptError("not a DSSE envelope")
    found = []
    for signature in signatures:
        keyid, text = _at(signature, "keyid"), _at(signature, "sig")
        if not isinstance(text, str) or not isinstance(keyid, str | None):
            raise CorruptError("not a DSSE envelope: one of its signatures is out of shape")
        found.append((keyid or "", _bytes(text)))
    return _bytes(payload), payload_type, found


def _statement(payload: bytes, payload_type: str) -> dict[str, Json]:
    try:
        found = json.loads(payload) if payload_type == PAYLOAD_TYPE else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("_type") != STATEMENT_TYPE:
        raise CorruptError("what an envelope holds is not an in-toto statement")
    return found


def _why_not(named: Sequence[str], keys: Mapping[str, PublicKey]) -> str:
    if not named:
        return "an envelope has no signature"
    known = [keys[keyid].label or keyid[:16] for keyid in named if keyid in keys]
    if known:
        return f"a signature by `{known[0]}` is not valid"
    return f"it is signed by {', '.join(_shown(keyid) for keyid in named[:3])}"


def _shown(keyid: str) -> str:
    """Whoever wrote it may have written anything, so nothing of it gets to a terminal as it is."""
    return f"`{ascii(keyid[:16])[1:-1]}`" if keyid else "a key without an id"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    """Of base64, standard or URL-safe, as DSSE asks; only as an encoder writes it, so that no bit of it is free."""
    standard = text.replace("-", "+").replace("_", "/")
    try:
        data = base64.b64decode(standard, validate=True)
    except ValueError:
        data = None
    if data is None or _base64(data) != standard:
        raise CorruptError("not a DSSE envelope: it is not in base64")
    return data


def _at(value: object, *path: str) -> object:
    """What is under these keys, one below the other; None where there is nothing."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
