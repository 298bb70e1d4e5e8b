"""`llmopt store`: the artifacts that are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from json import loads
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmopt.cli import options as opt
from llmopt.cli import store_exchange, store_remote, store_tools, store_trust
from llmopt.cli.references import resolve
from llmopt.cli.tables import table
from llmopt.errors import CorruptError, Exit

if TYPE_CHECKING:
    from llmopt.artifacts.manifest import Manifest
    from llmopt.artifacts.remote import Remote
    from llmopt.artifacts.store import Store


app = typer.Typer(
    name="store",
    help="The artifacts: list, show, compare, verify, sign, name, copy, send, fetch and remove them.\n\n"
    "An ARTIFACT is an id, its first 8 digits or more, or a name.",
)

app.command("diff")(store_tools.diff)
Artifact = Annotated[str, opt.argument(metavar="ARTIFACT")]


@app.command("ls")
def list_artifacts(
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """List the artifacts, the newest first."""
    import time

    from llmopt.artifacts.disk import byte_size
    from llmopt.pipeline.explain import different_results

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    names = _names(session.store)
    found = session.store.ls()
    results = different_results(manifest for manifest, _ in found)
    rows = [["ARTIFACT", "KIND", "MADE BY", "NAMES", "STORED", "SIZE"]]
    for manifest, created_s in found:
        stored = time.strftime("%Y-%m-%d %H:%M", time.localtime(created_s))
        operation = manifest.action.op if manifest.action else "-"
        if results[manifest.id]:
            operation += f" (1 of {results[manifest.id]} different results)"
        labels = " ".join(names.get(manifest.id, ["-"]))
        rows.append([manifest.id[:19], manifest.kind, operation, labels, stored, byte_size(manifest.size)])
    listed = [
        {
            "artifact": manifest.id,
            "kind": manifest.kind,
            "status": manifest.status,
            "op": manifest.action.op if manifest.action else None,
            "names": names.get(manifest.id, []),
            "bytes": manifest.size,
            "created": created_s,
            "reproducible": not results[manifest.id],
        }
        for manifest, created_s in found
    ]
    unlisted = len(session.store.ids()) - len(found)
    if unlisted:
        session.console.progress(f"{unlisted} damaged and not listed: see `llmopt store verify`")
    session.console.result(table(rows, left=5), {"store": session.store.url, "artifacts": listed})


@app.command("show")
def show(
    artifact: Artifact,
    lineage: Annotated[
        bool, opt.option("--lineage", help="All that it was made from, back to the checkpoint.")
    ] = False,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show what ARTIFACT was made from, with what and by whom, and its files."""
    from llmopt.pipeline.explain import distinct_results

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    manifest = session.store.get(resolve(session.store, artifact))
    if lineage:
        from llmopt.pipeline.lineage import tree

        node = tree(session.store, manifest.id)
        session.console.result("\n".join(store_tools.tree_lines(node)), {"artifact": manifest.id, "lineage": node})
        return
    results = distinct_results(session.store, manifest.action)
    value = {
        "artifact": manifest.id,
        "names": _names(session.store).get(manifest.id, []),
        "manifest": loads(manifest.to_bytes()),
        "attestations": session.store.attestations(manifest.id),
        "reproducible": not results,
        "results": list(results),
        "worst_linears": _worst_linears(session, manifest),
    }
    session.console.result("\n".join(_lines(manifest, value)), value)


@app.command("verify")
def verify(
    artifact: Annotated[str | None, opt.argument(metavar="ARTIFACT")] = None,
    require_signed_by: store_trust.RequireSignedBy = None,
    sample: Annotated[
        str | None, opt.option("--sample", metavar="SHARE", help="Read a random part of it only, as 10%.")
    ] = None,
    repair_from: Annotated[
        str | None, opt.option("--repair-from", metavar="URL", help="Put right what this other store has whole.")
    ] = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Read every byte of ARTIFACT, or of all, again and compare it with its digest. Exits with 4 if one differs.

    With --require-signed-by also if nobody has signed how it was made whose public key is given.
    """
    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    trust, share = store_trust.Trust.read(require_signed_by), store_remote.share_of(sample)
    source = None if repair_from is None else _open_remote(repair_from)
    ids = session.store.ids() if artifact is None else [resolve(session.store, artifact)]
    problems: dict[str, list[str]] = {}
    repaired: list[str] = []
    for id_ in ids:
        found, damaged = store_remote.problems(session.store, id_, share, session)
        if found and source is not None:
            for _ in range(2):  # a manifest first, then what it lists
                store_remote.repair(session.store, id_, damaged, source, session)
                found, damaged = store_remote.problems(session.store, id_, 1.0, session)
                if not found:
                    repaired.append(id_)
                    break
        found = found or trust.problems(session.store, id_)
        if found:
            problems[id_] = found
    if artifact is None:
        if source is not None:
            repaired += store_remote.repair_names(session.store, source, session)
        problems |= {name: [problem] for name, problem in session.store.broken_names().items()}
    lines = [f"{id_}: repaired" for id_ in repaired]
    lines += [f"{id_}: {problem}" for id_, found in problems.items() for problem in found]
    verdict = f"{len(ids) - len(problems.keys() & set(ids))} of {len(ids)} artifacts are {trust.wanted}"
    session.console.result(
        "\n".join([*lines, verdict]), {"verified": len(ids), "problems": problems, "repaired": repaired}
    )
    return int(Exit.VERIFICATION_FAILED if problems else Exit.OK)


app.command("keygen")(store_trust.keygen)
app.command("sign")(store_trust.sign)


@app.command("name")
def give_name(
    artifact: Artifact,
    name: Annotated[str, opt.argument(metavar="NAME")],
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Let NAME stand for ARTIFACT from now on."""
    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    found = resolve(session.store, artifact)
    session.store.set_name(name, found)
    session.console.result(f"{name} {found}", {"name": name, "artifact": found})


app.command("export")(store_exchange.export)
app.command("import")(store_exchange.import_)
app.command("push")(store_remote.push)
app.command("pull")(store_remote.pull)
app.command("gc")(store_remote.collect)
app.command("probe")(store_remote.probe)


def _open_remote(url: str) -> Remote:
    from llmopt.artifacts.remote import Remote

    return Remote.open(url)


def _names(store: Store) -> dict[str, list[str]]:
    """The names of each artifact."""
    found: dict[str, list[str]] = {}
    for name, artifact in sorted(store.names().items()):
        found.setdefault(artifact, []).append(name)
    return found


def _worst_linears(session: opt.Session, manifest: Manifest) -> list[dict[str, Any]]:
    """The five of a quantized model with the largest error, if it has its errors with it."""
    from llmopt.quantizers import errors_report

    try:
        written = session.store.read(manifest, errors_report.FILE)
    except CorruptError as error:
        session.console.progress(error.message)
        return []
    return [] if written is None else errors_report.worst(loads(written), 5)


def _lines(manifest: Manifest, value: Mapping[str, Any]) -> Iterator[str]:
    from llmopt.artifacts.disk import byte_size

    yield f"artifact  {manifest.id}"
    yield f"kind      {manifest.kind}, {manifest.status}, {byte_size(manifest.size)}"
    if value["names"]:
        yield f"names     {' '.join(value['names'])}"
    if manifest.action is not None:
        action = manifest.action
        yield f"made by   {action.op} (version {action.op_version}), key {action.key}"
        for part in ("inputs", "settings", "deps", "target"):
            yield from (f"{part:<9} {name}: {item}" for name, item in sorted(getattr(action, part).items()))
        yield f"code      {action.code}"
    if value["results"]:
        yield "results   not reproducible: the same action has given these"
        yield from (f"result    {artifact}" for artifact in value["results"])
    yield from (f"metric    {name}: {figure}" for name, figure in manifest.metrics.items())
    yield from (f"event     {event}" for event in manifest.events)
    for linear in value["worst_linears"]:
        yield f"worst     {linear['error']:.4f}  {linear['linear']}, {linear['bits']} bits"
    for statement in value["attestations"]:
        run = statement.get("predicate", {}).get("runDetails", {}).get("metadata", {})
        yield f"run       {run.get('startedOn')} to {run.get('finishedOn')} on {run.get('llmopt_host')}"
    yield from (f"file      {file.sha256[:12]} {file.size:>12} {file.path}" for file in manifest.files)
