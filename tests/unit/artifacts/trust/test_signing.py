"""A signature by a trusted key makes a statement count for the artifact that it is about, and nothing else does."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmopt.artifacts import Action, Manifest, Store, attest, canonical_json
from llmopt.artifacts.manifest import FileEntry
from llmopt.artifacts.trust.keys import PublicKey, SigningKey
from llmopt.artifacts.trust.signing import PAYLOAD_TYPE, pae, require, sign, trusted, unwrap, verify
from llmopt.errors import CorruptError, LlmoptError

Put = Callable[..., Manifest]
MakeAction = Callable[..., Action]


def a_key(number: int) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32), f"key-{number}")


OURS, THEIRS = a_key(1), a_key(2)
ACTION = Action(op="quantize.rtn", op_version=1, inputs={}, settings={"bits": 4}, code="", deps={}, target={})
MADE = Manifest(kind="model", files=(FileEntry("a", 1, "0" * 64),), action=ACTION)
STATEMENT = attest(MADE, started=1, finished=2, command=["llmopt"])
ENVELOPE = sign(STATEMENT, OURS)


def resigned(change: Callable[[Any], None], key: SigningKey = OURS) -> dict[str, Any]:
    """The envelope of a changed statement, signed by us."""
    statement = copy.deepcopy(STATEMENT)
    change(statement)
    return sign(statement, key)


def envelope(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> dict[str, Any]:
    """A right signature over anything."""
    sig = base64.b64encode(OURS.sign(pae(payload_type, payload))).decode()
    signature = {"keyid": OURS.public.keyid, "sig": sig}
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [signature],
    }


def test_the_example_of_the_specification_is_encoded_as_there() -> None:
    found = pae("http://example.com/HelloWorld", b"hello world")
    assert found == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_what_was_signed_comes_out_with_its_signer() -> None:
    found = verify(ENVELOPE, [THEIRS.public, OURS.public])
    assert (found.statement, found.keyids) == (STATEMENT, (OURS.public.keyid,))
    assert trusted(MADE, [ENVELOPE], [OURS.public]) == found


def test_an_envelope_has_the_fields_of_dsse_and_is_always_the_same() -> None:
    assert sign(STATEMENT, OURS) == ENVELOPE
    assert set(ENVELOPE) == {"payload", "payloadType", "signatures"}
    assert ENVELOPE["payloadType"] == "application/vnd.in-toto+json"
    assert json.loads(base64.b64decode(str(ENVELOPE["payload"]))) == STATEMENT


FIELDS: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "payload": lambda value: (value, "payload"),
    "payloadType": lambda value: (value, "payloadType"),
    "keyid": lambda value: (value["signatures"][0], "keyid"),
    "sig": lambda value: (value["signatures"][0], "sig"),
}


@given(field=st.sampled_from(sorted(FIELDS)), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 6))
@settings(max_examples=400)
def test_a_flipped_bit_anywhere_is_not_trusted(field: str, place: float, bit: int) -> None:
    changed = copy.deepcopy(ENVELOPE)
    inside, name = FIELDS[field](changed)
    text = bytearray(inside[name].encode())
    text[int(place * len(text))] ^= 1 << bit
    inside[name] = text.decode()
    assert trusted(MADE, [changed], [OURS.public]) is None


@pytest.mark.parametrize("field", ["payload", "sig"])
def test_the_bits_that_base64_leaves_free_are_not_free(field: str) -> None:
    """A decoder that drops them takes several texts for the same bytes."""
    padded = [resigned(lambda s, n=n: s["predicate"].update(llmopt_pad="x" * n)) for n in range(3)]
    changed = next(found for found in padded if found["payload"].endswith("="))
    assert trusted(MADE, [changed], [OURS.public]) is not None
    inside, name = FIELDS[field](changed)
    text, padding = inside[name].rstrip("="), "=" * inside[name].count("=")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = f"{text[:-1]}{alphabet[alphabet.index(text[-1]) + 1]}{padding}"
    assert base64.b64decode(other) == base64.b64decode(text + padding)
    inside[name] = other
    assert trusted(MADE, [changed], [OURS.public]) is None


def test_url_safe_base64_is_as_good() -> None:
    changed: Any = copy.deepcopy(ENVELOPE)
    changed["payload"] = changed["payload"].replace("+", "-").replace("/", "_")
    changed["signatures"][0]["sig"] = changed["signatures"][0]["sig"].replace("+", "-").replace("/", "_")
    assert trusted(MADE, [changed], [OURS.public]) is not None


@pytest.mark.parametrize("keyid", ["", None, ...])
def test_a_key_without_its_id_counts_as_dsse_has_it(keyid: object) -> None:
    changed: Any = copy.deepcopy(ENVELOPE)
    if keyid is ...:
        del changed["signatures"][0]["keyid"]
    else:
        changed["signatures"][0]["keyid"] = keyid
    assert verify(changed, [THEIRS.public, OURS.public]).keyids == (OURS.public.keyid,)
    assert trusted(MADE, [changed], [THEIRS.public]) is None


def test_fields_that_are_not_known_are_passed_over() -> None:
    changed: Any = copy.deepcopy(ENVELOPE)
    changed["more"] = changed["signatures"][0]["cert"] = "x"
    assert trusted(MADE, [changed], [OURS.public]) is not None


def test_of_two_signatures_one_by_a_known_key_is_enough() -> None:
    changed: Any = copy.deepcopy(ENVELOPE)
    changed["signatures"] += sign(STATEMENT, THEIRS)["signatures"]  # type: ignore[operator]
    assert verify(changed, [OURS.public]).keyids == (OURS.public.keyid,)
    assert verify(changed, [THEIRS.public]).keyids == (THEIRS.public.keyid,)
    assert set(verify(changed, [OURS.public, THEIRS.public]).keyids) == {OURS.public.keyid, THEIRS.public.keyid}
    assert trusted(MADE, [changed], [a_key(3).public]) is None


def test_of_two_envelopes_one_by_a_known_key_is_enough() -> None:
    assert trusted(MADE, [sign(STATEMENT, THEIRS), {"payload": 1}, ENVELOPE], [OURS.public]) is not None


def test_a_signature_put_under_another_key_id_does_not_count() -> None:
    changed: Any = copy.deepcopy(sign(STATEMENT, THEIRS))
    changed["signatures"][0]["keyid"] = OURS.public.keyid
    with pytest.raises(CorruptError, match="a signature by `key-1` is not valid"):
        require(MADE, [changed], [OURS.public])


def test_no_key_trusts_nothing() -> None:
    assert trusted(MADE, [ENVELOPE], []) is None


CHANGES: dict[str, Callable[[Any], None]] = {
    "another artifact": lambda s: s["subject"][-1]["digest"].update(sha256="1" * 64),
    "another name": lambda s: s["subject"][-1].update(name="other.json"),
    "no subject": lambda s: s.pop("subject"),
    "an odd subject": lambda s: s.update(subject=["llmopt.json", {"name": "llmopt.json"}, None]),
    "another action": lambda s: s["predicate"]["buildDefinition"]["internalParameters"].update(key="2" * 64),
    "no action": lambda s: s["predicate"]["buildDefinition"].pop("internalParameters"),
    "no predicate": lambda s: s.pop("predicate"),
    "another predicate": lambda s: s.update(predicateType="https://slsa.dev/verification_summary/v1"),
    "an older predicate": lambda s: s.update(predicateType="https://slsa.dev/provenance/v0.2"),
    "another type": lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_right_signature_of_something_else_does_not_count(change: str) -> None:
    changed = resigned(CHANGES[change])
    assert trusted(MADE, [changed], [OURS.public]) is None
    assert trusted(MADE, [changed, ENVELOPE], [OURS.public]) is not None


@pytest.mark.parametrize(
    "payload",
    [b"", b"not json", b"[]", b"null", b"\xff", b"[" * 100_000],
    ids=["none", "words", "list", "null", "bytes", "deep"],
)
def test_a_right_signature_of_no_statement_does_not_count(payload: bytes) -> None:
    with pytest.raises(CorruptError, match="not an in-toto statement"):
        verify(envelope(payload), [OURS.public])


def test_a_payload_of_another_type_is_not_read_as_a_statement() -> None:
    changed = envelope(canonical_json(STATEMENT), "application/json")
    with pytest.raises(CorruptError, match="not an in-toto statement"):
        verify(changed, [OURS.public])


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x), max_leaves=3)


@given(
    st.dictionaries(st.sampled_from(["payload", "payloadType", "signatures"]), JSON)
    | st.fixed_dictionaries(
        {
            "payload": st.just(ENVELOPE["payload"]) | JSON,
            "payloadType": st.just(PAYLOAD_TYPE) | st.just("\ud800") | JSON,
            "signatures": st.lists(
                st.dictionaries(st.sampled_from(["keyid", "sig"]), JSON | st.just("\ud800") | st.just("AAAA")) | JSON
            ),
        }
    )
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_whatever_lies_there_is_an_envelope_or_corrupt(value: dict[str, Any]) -> None:
    with pytest.raises(CorruptError):
        verify(value, [OURS.public])


def test_what_is_missing_is_said_and_what_others_wrote_is_not_printed_as_it_is() -> None:
    with pytest.raises(CorruptError, match="no valid signature by `key-1`: it is not signed") as caught:
        require(MADE, [], [OURS.public])
    assert "llmopt store sign" in str(caught.value.hint)
    with pytest.raises(CorruptError, match=f"by `key-1` or `key-3`: it is signed by `{THEIRS.public.keyid[:16]}`"):
        require(MADE, [sign(STATEMENT, THEIRS)], [OURS.public, a_key(3).public])
    changed: Any = copy.deepcopy(ENVELOPE)
    changed["signatures"][0]["keyid"] = "\x1b[2J\n"
    with pytest.raises(CorruptError) as caught:
        require(MADE, [changed], [OURS.public])
    assert caught.value.message.isprintable()
    with pytest.raises(CorruptError, match="has no signature"):
        require(MADE, [{**ENVELOPE, "signatures": []}], [OURS.public])


def test_a_key_id_is_the_digest_of_the_key() -> None:
    assert PublicKey(b"").keyid == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class TestInAStore:
    @pytest.fixture
    def made(self, put: Put, make_action: MakeAction) -> Manifest:
        return put(action=make_action(), attestation=lambda m: attest(m, started=1, finished=2))

    def test_a_statement_and_its_envelopes_are_one_run(self, store: Store, made: Manifest) -> None:
        (statement,) = store.attestations(made.id)
        for key in (OURS, THEIRS, OURS):
            store.attach(made.id, sign(statement, key))
        assert store.attestations(made.id) == [statement]
        found = store.envelopes(made.id)
        assert len(found) == 2
        assert trusted(made, found, [OURS.public]) == trusted(made, [sign(statement, OURS)], [OURS.public])
        assert trusted(made, found, [THEIRS.public]) is not None
        assert store.verify(made.id) == []

    def test_what_is_only_there_signed_is_a_run_too(self, store: Store, put: Put) -> None:
        made = put(attestation=lambda m: sign(attest(m, started=1, finished=2), OURS))
        (statement,) = store.attestations(made.id)
        assert unwrap(store.envelopes(made.id)[0]) == statement
        assert trusted(made, store.envelopes(made.id), [OURS.public]) is not None

    def test_a_statement_about_another_artifact_is_refused(self, store: Store, put: Put, made: Manifest) -> None:
        other = put({"a": b"1"}, attestation=lambda m: attest(m, started=1, finished=2))
        with pytest.raises(CorruptError, match="about another artifact"):
            store.attach(made.id, sign(store.attestations(other.id)[0], OURS))
        with pytest.raises(LlmoptError, match="no artifact"):
            store.attach("sha256:" + "0" * 64, ENVELOPE)
        assert store.envelopes(made.id) == []

    def test_what_is_damaged_is_passed_over(self, store: Store, made: Manifest) -> None:
        folder = store.root / "attestations" / made.hex
        for number, text in enumerate(('{"payloadType": 1}', '{"payloadType": "x", "payload": "!"}', "[", "")):
            Path(folder / f"{number:064x}.json").write_text(text)
        assert len(store.attestations(made.id)) == 1
        assert trusted(made, store.envelopes(made.id), [OURS.public]) is None
