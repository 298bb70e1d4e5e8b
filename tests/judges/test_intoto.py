"""in-toto's own libraries are the judges of what is signed and of what is said in it: `make judge-intoto`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts import Action, Manifest, Store, attest
from llmopt.artifacts.trust.keys import generate, read_private
from llmopt.artifacts.trust.signing import require, sign, trusted

pytestmark = [pytest.mark.judge, pytest.mark.filterwarnings("default")]

dsse = pytest.importorskip("securesystemslib.dsse", reason="securesystemslib judges envelopes: `make judge-intoto`")
json_format = pytest.importorskip("google.protobuf.json_format", reason="it reads statements: `make judge-intoto`")

COMMIT = "0123456789" * 4
ACTION = Action(
    op="quantize.gptq",
    op_version=1,
    inputs={
        "model": "sha256:" + "0" * 64,
        "model_source": f"hf:org/Name@{COMMIT}",
        "calibration_source": f"hf:datasets/org/rows@{COMMIT}",
        "server": "http://localhost:8000/v1",
    },
    settings={"bits": 4, "damping": 0.01, "overrides": {"*.down_proj": {"bits": 8}}, "method": None},
    code="sha256:" + "1" * 64,
    deps={"torch": "2.13.0+cpu", "tensorrt_llm": "1.2.1", "cuda": "13.0"},
    target={"arch": "x86_64"},
)


@pytest.fixture(params=[ACTION, None], ids=["action", "import"])
def made(request: pytest.FixtureRequest, store: Store) -> Manifest:
    with store.stage() as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b.bin").write_bytes(b"bytes")
        return store.put(
            folder,
            kind="model",
            action=request.param,
            attestation=lambda m: attest(m, started=1, finished=1e9, byproducts={"build.log": "done\n"}),
        )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def statement(store: Store, made: Manifest) -> dict[str, Any]:
    return store.attestations(made.id)[0]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    generate(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def theirs(key: Path) -> Any:
    """Our public key as theirs, read by them from our file."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    public = load_pem_public_key(key.with_name("key.pub").read_bytes())
    return SSlibKey.from_crypto(public, keyid=read_private(key).public.keyid)


@pytest.fixture(params=["theirs", "openssl"])
def arithmetic(request: pytest.FixtureRequest, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They bring an ed25519 of their own, and use OpenSSL's where there is one; a key they read with that only."""
    if request.param == "theirs":
        monkeypatch.setattr("securesystemslib.signer._key.CRYPTO_IMPORT_ERROR", "not today")


@pytest.mark.usefixtures("arithmetic")
class TestTheEnvelope:
    def test_is_verified_by_them(self, statement: dict[str, Any], key: Path, theirs: Any) -> None:
        envelope = dsse.Envelope.from_dict(copy.deepcopy(sign(statement, read_private(key))))
        assert list(envelope.verify([theirs], 1)) == [theirs.keyid]
        assert json.loads(envelope.payload) == statement

    def test_is_refused_by_both_when_a_bit_is_flipped(
        self, made: Manifest, statement: dict[str, Any], key: Path, theirs: Any
    ) -> None:
        from securesystemslib.exceptions import VerificationError

        given: Any = sign(statement, read_private(key))
        for place in range(0, len(given["payload"]) - 4, 97):
            changed = copy.deepcopy(given)
            other = "A" if given["payload"][place] != "A" else "B"
            changed["payload"] = given["payload"][:place] + other + given["payload"][place + 1 :]
            assert trusted(made, [changed], [read_private(key).public]) is None
            with pytest.raises(VerificationError):
                dsse.Envelope.from_dict(changed).verify([theirs], 1)

    def test_of_theirs_is_taken_by_us(self, made: Manifest, statement: dict[str, Any], key: Path, theirs: Any) -> None:
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from securesystemslib.signer import CryptoSigner

        signer = CryptoSigner(load_pem_private_key(key.read_bytes(), None), theirs)
        payload = json.dumps(statement, indent=2).encode()
        envelope = dsse.Envelope(payload, "application/vnd.in-toto+json", {})
        envelope.sign(signer)
        signed = require(made, [envelope.to_dict()], [read_private(key).public])
        assert (signed.statement, signed.keyids) == (statement, (theirs.keyid,))


class TestTheStatement:
    def test_is_valid(self, statement: dict[str, Any]) -> None:
        from in_toto_attestation.v1 import statement_pb2
        from in_toto_attestation.v1.statement import Statement

        read = json_format.ParseDict(statement, statement_pb2.Statement())
        Statement.copy_from_pb(read).validate()
        assert json_format.MessageToDict(read)["subject"] == statement["subject"]

    def test_has_nothing_that_provenance_does_not_know_but_our_own_fields(self, statement: dict[str, Any]) -> None:
        from in_toto_attestation.predicates.provenance.v1 import provenance_pb2

        own = statement["predicate"]["runDetails"]["metadata"]
        plain = copy.deepcopy(statement["predicate"])
        plain["runDetails"]["metadata"] = {name: own[name] for name in own if not name.startswith("llmopt_")}
        read = json_format.ParseDict(plain, provenance_pb2.Provenance())  # strict: an unknown field is an error
        assert json_format.MessageToDict(read) == plain
        tolerant = json_format.ParseDict(
            statement["predicate"], provenance_pb2.Provenance(), ignore_unknown_fields=True
        )
        assert tolerant == read

    def test_has_what_slsa_requires_and_every_resource_is_one(self, statement: dict[str, Any]) -> None:
        from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
        from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor

        read = json_format.ParseDict(statement["predicate"], provenance_pb2.Provenance(), ignore_unknown_fields=True)
        assert read.build_definition.build_type
        assert read.build_definition.external_parameters
        assert read.run_details.builder.id
        assert read.run_details.byproducts[0].content == b"done\n"
        for resource in (*read.build_definition.resolved_dependencies, *read.run_details.byproducts):
            ResourceDescriptor.copy_from_pb(resource).validate()
            assert resource.uri or resource.digest or resource.content
