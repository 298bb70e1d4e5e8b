"""`llmopt store keygen | sign`, and what `verify` asks of signatures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmopt.cli import options as opt
from llmopt.errors import CorruptError, LlmoptError, SettingsError

if TYPE_CHECKING:
    from llmopt.artifacts.outcome import Json
    from llmopt.artifacts.store import Store
    from llmopt.artifacts.trust.keys import PublicKey

RequireSignedBy = Annotated[
    list[str] | None,
    opt.option("--require-signed-by", metavar="KEY", help="A public key, one or several: by one of them."),
]


@dataclass(frozen=True)
class Trust:
    """The keys whose word counts; without any, an artifact only has to be whole."""

    keys: Sequence[PublicKey] = ()

    @classmethod
    def read(cls, files: Sequence[str] | None) -> Trust:
        if not files:
            return cls()
        from llmopt.artifacts.trust.keys import read_public

        return cls([read_public(file) for file in files])

    @property
    def wanted(self) -> str:
        return "whole and signed" if self.keys else "whole"

    def problems(self, store: Store, artifact: str) -> list[str]:
        """Why an artifact that is whole is not to be trusted; nothing when it is."""
        if not self.keys:
            return []
        from llmopt.artifacts.trust import signing

        try:
            signing.require(store.get(artifact), store.envelopes(artifact), self.keys)
        except CorruptError as error:
            return [error.message]
        return []


def keygen(
    file: Annotated[str, opt.argument(metavar="FILE")],
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Make a key to sign with: FILE for whoever signs, and FILE.pub for whoever is to trust that.

    It gets the passphrase in LLMOPT_SIGN_PASSPHRASE, if there is one. Nothing is overwritten.
    """
    from llmopt.artifacts.trust.keys import generate

    session = opt.session(None, json=json, quiet=quiet, verbose=verbose)
    public = generate(Path(file))
    lines = (f"private   {file}", f"public    {public.label}", f"keyid     {public.keyid}")
    session.console.result("\n".join(lines), {"private": file, "public": public.label, "keyid": public.keyid})


def sign(
    artifact: Annotated[str, opt.argument(metavar="ARTIFACT")],
    key: Annotated[
        str | None,
        opt.option("--key", envvar="LLMOPT_SIGN_KEY", metavar="FILE", help="The private key: from `keygen`, or ssh's."),
    ] = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Vouch for ARTIFACT: read every byte of it, and sign the newest statement of how it was made.

    With --json also the signed statement: a DSSE envelope, for other tools.
    """
    from llmopt.artifacts.trust import signing
    from llmopt.cli.references import resolve

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose, sign_key=key)
    if session.signer is None:
        raise SettingsError("no key to sign with", hint="`--key FILE`; `llmopt store keygen FILE` makes one")
    found = resolve(session.store, artifact)
    envelope = signing.sign(_statement(session.store, found), session.signer)
    session.store.attach(found, envelope)
    keyid = session.signer.public.keyid
    session.console.result(f"{found} signed by {keyid}", {"artifact": found, "keyid": keyid, "envelope": envelope})


def _statement(store: Store, artifact: str) -> dict[str, Json]:
    """The newest about an artifact, of which every byte is as it should be."""
    from llmopt.artifacts.trust.signing import check_about

    if problems := store.verify(artifact):
        raise CorruptError(f"`{artifact}` is not signed: {problems[0]}", hint="see `llmopt store verify`")
    manifest = store.get(artifact)
    for statement in reversed(store.attestations(artifact)):
        with suppress(CorruptError):
            check_about(statement, manifest)
            return statement
    raise LlmoptError(
        f"nothing in the store says how `{artifact}` was made, so there is nothing to sign",
        hint="make it again in another store, with `--store` and `--sign-key`",
    )
