"""`llmopt store push | pull | gc | probe`: stores on S3 and in shared folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmopt.cli import options as opt
from llmopt.cli.references import resolve
from llmopt.errors import LlmoptError, SettingsError

if TYPE_CHECKING:
    from llmopt.artifacts.remote import Remote
    from llmopt.artifacts.store import Store

Artifact = Annotated[str, opt.argument(metavar="ARTIFACT")]
Url = Annotated[str, opt.argument(metavar="URL")]


def push(
    artifact: Artifact,
    url: Url,
    name: Annotated[
        str | None, opt.option("--name", metavar="NAME", help="Let this name stand for it there from now on.")
    ] = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    json_lines: opt.JsonLines = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Send ARTIFACT to the store at URL: s3://BUCKET/PREFIX, or a folder.

    Only what is missing there is sent. Cut off or killed, the same command goes on where it stopped.
    """
    from llmopt.artifacts.layout import check_name
    from llmopt.artifacts.remote import Remote, transfer

    session = opt.session(store, json=json, json_lines=json_lines, quiet=quiet, verbose=verbose)
    if name is not None:
        check_name(name)
    found, remote = resolve(session.store, artifact), Remote.open(url)
    session.store.fetch(found)
    if name is None:
        moved = transfer.push(session.store, found, remote, session.console.progress)
    else:
        with remote.writing((), [found], session.console.progress):  # so that it stays until it has its name
            moved = transfer.push(session.store, found, remote, session.console.progress)
            _move_name(remote, name, found, session)
    text = f"{remote.url} {found}" + (f" ({name})" if name else "")
    session.console.result(text, {"artifact": found, "url": remote.url, "name": name, **moved.to_json()})


def pull(
    artifact: Artifact,
    url: Url,
    include: Annotated[
        list[str] | None,
        opt.option("--include", metavar="GLOB", help="Only files like this, as '*.json'; into the folder of --out."),
    ] = None,
    out: Annotated[
        str | None, opt.option("--out", metavar="DIR", help="Copy it here (or to s3://...), or what --include names.")
    ] = None,
    name: opt.Name = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    json_lines: opt.JsonLines = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Fetch ARTIFACT from the store at URL: s3://BUCKET/PREFIX, or a folder.

    Every byte is compared with its digest as it comes. Cut off or killed, the same command goes on where it stopped.
    """
    from llmopt.artifacts.layout import check_name
    from llmopt.artifacts.objects import is_s3
    from llmopt.artifacts.remote import Remote, transfer
    from llmopt.cli.deliver import check_destination, copy_to

    session = opt.session(store, json=json, json_lines=json_lines, quiet=quiet, verbose=verbose)
    if name is not None:
        check_name(name)
    if include and (out is None or name is not None or is_s3(out)):
        raise SettingsError(
            "a part of an artifact goes into a folder, and is none itself", hint="`--out DIR`, and no `--name`"
        )
    if out is not None:
        check_destination(out)
    remote = Remote.open(url)
    found = _resolve_there(remote, artifact)
    about: dict[str, Any] = {"artifact": found, "url": remote.url, "name": name, "path": out}
    if include and out is not None:
        moved = transfer.pull_part(found, remote, Path(out), include, session.console.progress)
    else:
        _require_signed(remote, found)
        moved = transfer.pull(session.store.here, found, remote, session.console.progress)
        session.store.send(found)
        if name is not None:
            session.store.set_name(name, found)
        if out is not None:
            copy_to(session.store, found, out, session.console.progress)
    session.console.result(f"{out or session.store.url} {found}", {**about, **moved.to_json()})


def collect(
    older_than: Annotated[
        str, opt.option("--older-than", metavar="TIME", help="Only what was not used for so long: 12h, 14d.")
    ] = "14d",
    dry_run: Annotated[bool, opt.option("--dry-run", help="Only say what would be removed.")] = False,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Remove what nobody needs: no name stands for it, nothing uses it, and it is old.

    What an artifact that is kept was made from is kept too. Others may go on writing meanwhile.
    """
    from llmopt.artifacts.disk import byte_size
    from llmopt.artifacts.local import collect_local
    from llmopt.artifacts.remote.collect import collect as collect_remote

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    age_s = opt.duration("--older-than", older_than)
    remote = _remote_of(session.store)
    if remote is None:
        found = collect_local(session.store, older_than_s=age_s, dry_run=dry_run, progress=session.console.progress)
    else:
        found = collect_remote(remote, older_than_s=age_s, dry_run=dry_run, progress=session.console.progress)
    lines = [f"{artifact}" for artifact in found.artifacts]
    what = "would be removed" if dry_run else "removed"
    lines.append(
        f"{len(found.artifacts)} artifacts and {found.blobs} files {what}, {byte_size(found.bytes)}; {found.kept} kept"
    )
    if found.damaged:
        lines.append(f"{found.damaged} damaged artifacts are left alone: see `llmopt store verify`")
    session.console.result("\n".join(lines), {"store": session.store.url, "dry_run": dry_run, **found.to_json()})


def probe(
    url: Url,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Find out what the S3 server behind URL (s3://BUCKET/PREFIX) can be relied on for.

    The store is correct whatever it answers. Its own objects are removed again.
    """
    from llmopt.artifacts.objects import is_s3, open_s3
    from llmopt.artifacts.objects.abilities import probe as ask

    session = opt.session(None, json=json, quiet=quiet, verbose=verbose)
    if not is_s3(url):
        raise SettingsError(f"`{url}` is no place on S3", hint="give `s3://BUCKET/PREFIX`; a folder can all of it")
    found = ask(open_s3(url))
    session.console.result("\n".join(_answers(found.to_json())), {"url": url, **found.to_json()})


def repair(store: Store, artifact: str, problems: Mapping[str, str], source: Remote, session: opt.Session) -> None:
    """Put an artifact right from a store that has it whole. `problems` names what is damaged by its sha256."""
    from llmopt.artifacts.remote import transfer
    from llmopt.artifacts.store import Store

    remote = _remote_of(store)
    here = Store(store.root, verify_full=True)
    transfer.pull(here, artifact, source, session.console.progress)
    if remote is not None:
        transfer.push(here, artifact, remote, session.console.progress, replace=tuple(problems))


def repair_names(store: Store, source: Remote, session: opt.Session) -> list[str]:
    """Let names that stand for nothing stand for what they stand for in another store; those that do then."""
    from llmopt.artifacts.remote import transfer

    repaired = []
    for name in store.broken_names():
        try:
            artifact = source.named(name)
            if artifact is not None:
                if artifact not in store.ids():
                    transfer.pull(store.here, artifact, source, session.console.progress)
                store.set_name(name, artifact)
                repaired.append(name)
        except LlmoptError as error:
            session.console.progress(error.message)
    return repaired


def problems(store: Store, artifact: str, share: float, session: opt.Session) -> tuple[list[str], dict[str, str]]:
    """What is wrong with an artifact, in words and by sha256, in the place that the store is."""
    from llmopt.artifacts import layout
    from llmopt.artifacts.objects.disk import DiskObjects
    from llmopt.artifacts.remote import Remote, verify

    remote = _remote_of(store)
    if remote is None and share >= 1:
        return store.verify(artifact), {}
    place = remote or Remote(DiskObjects(store.root))
    found = verify.problems(place, artifact, share=share)
    if remote is None:
        store.blobs.distrust(sha256 for sha256 in found if layout.HEX.fullmatch(sha256))
    try:
        manifest = place.get(artifact)
    except LlmoptError:
        manifest = None
    return list(found.values() if manifest is None else verify.by_path(manifest, found)), found


def share_of(text: str | None) -> float:
    """`10%` or `0.1`, the value of `--sample`; all without it."""
    if text is None:
        return 1.0
    try:
        share = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise SettingsError(f"`--sample {text}` is no share", hint="for example `--sample 10%`")
    return share


def _remote_of(store: Store) -> Remote | None:
    """The remote that the store is; None for one on this disk."""
    from llmopt.artifacts.remote.shared import S3Store

    return store.remote if isinstance(store, S3Store) else None


def _resolve_there(remote: Remote, reference: str) -> str:
    from llmopt.artifacts import layout

    if layout.is_id(reference):
        return reference
    found = (
        layout.the_one(reference, remote.listed())
        if layout.is_abbreviated(reference)
        else remote.named(reference)
        if layout.NAME.fullmatch(reference)
        else None
    )
    if found is None:
        from llmopt.errors import nearest

        names = remote.names()
        hint = nearest(reference, names) if names else f"`llmopt store ls --store {remote.url}` lists the artifacts"
        raise LlmoptError(f"no artifact `{reference}` in the store `{remote.url}`", hint=hint)
    return found


def _require_signed(remote: Remote, artifact: str) -> None:
    """By one of the keys in $LLMOPT_TRUST, if there are any."""
    from llmopt.artifacts.trust import signing
    from llmopt.artifacts.trust.keys import trusted_keys

    keys = trusted_keys(os.environ.get("LLMOPT_TRUST"))
    manifest = remote.get(artifact) if keys else None
    if manifest is not None:
        envelopes = [value for value in remote.statements(artifact) if signing.is_envelope(value)]
        signing.require(manifest, envelopes, keys)


def _move_name(remote: Remote, name: str, artifact: str, session: opt.Session) -> None:
    from llmopt.artifacts.remote.shared import told_of_name

    for line in told_of_name(remote, name, remote.set_name(name, artifact)):
        session.console.progress(line)


def _answers(found: Mapping[str, Any]) -> Iterator[str]:
    rounds = found["create_rounds"]
    rows: Sequence[tuple[str, object]] = (
        ("endpoint", found["endpoint"]),
        ("a small write takes", f"{found['round_trip_ms']} ms"),
        ("creating over an object is refused (If-None-Match)", found["create"]),
        ("  and one of 16 writers wins", f"{found['create_one_winner']} of {rounds} rounds"),
        ("swapping another version is refused (If-Match)", found["swap"]),
        ("  and one of 16 writers wins", f"{found['swap_one_winner']} of {rounds} rounds"),
        ("completing an upload over an object can be refused", found["complete_create"]),
        ("bytes that are not what was signed are refused", found["wrong_sha256_refused"]),
        ("what was just written is listed", found["listed_at_once"]),
        ("ranges can be read", found["ranges"]),
    )
    for name, value in rows:
        yield f"{name:<52} {'yes' if value is True else 'no' if value is False else value}"
    relied = found["relied_on"]
    yield f"names move by {'compare and swap' if relied['swaps'] else 'last writer wins'}"
