"""`llmopt store export` and `import`: artifacts as folders and as OCI layouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmopt.cli import options as opt
from llmopt.cli.references import resolve
from llmopt.errors import SettingsError

if TYPE_CHECKING:
    from llmopt.artifacts.manifest import Manifest
    from llmopt.artifacts.store import Store


def export(
    artifact: Annotated[str, opt.argument(metavar="ARTIFACT")],
    folder: Annotated[str, opt.argument(metavar="FOLDER")],
    oci: Annotated[bool, opt.option("--oci", help="As an OCI layout with ModelPack's media types.")] = False,
    name: Annotated[
        str | None,
        opt.option("--name", metavar="TAG", help="The tag in the layout [default: the artifact's name, or latest]."),
    ] = None,
    attestations: Annotated[
        bool | None,
        opt.option("--attestations/--no-attestations", help="With who made it where and when [default: with]."),
    ] = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Copy ARTIFACT, verified, into the new folder FOLDER, or to s3://BUCKET/PREFIX.

    With `--oci` FOLDER becomes an OCI layout for registries and their tools: `skopeo copy oci:FOLDER:TAG ...`.
    """
    from llmopt.artifacts.objects import is_s3
    from llmopt.cli.deliver import check_destination, copy_to

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    for flag, value in (("--name", name), ("--attestations", attestations)):
        if value is not None and not oci:
            raise SettingsError(f"`{flag}` is of an OCI layout", hint="add `--oci`")
    if oci and is_s3(folder):
        raise SettingsError("an OCI layout is written to a folder of this machine", hint="`skopeo copy` sends it on")
    if not oci:
        check_destination(folder)
    found = resolve(session.store, artifact)
    if not oci:
        copy_to(session.store, found, folder, session.console.progress)
        session.console.result(f"{folder} {found}", {"path": folder, "artifact": found})
        return
    from llmopt.artifacts import oci as layouts

    tag = name or (artifact if session.store.names().get(artifact) == found else "latest")
    written = layouts.export(session.store, found, Path(folder), tag=tag, attestations=attestations is not False)
    session.console.result(
        f"{folder}:{tag} {written.digest} {found}",
        {
            "path": folder,
            "artifact": found,
            "tag": written.tag,
            "digest": written.digest,
            "attestations": written.attestations,
        },
    )


def import_(
    source: Annotated[str, opt.argument(metavar="SOURCE")],
    name: opt.Name = None,
    digest: Annotated[
        str | None, opt.option("--digest", metavar="SHA256", help="Which of the manifests in an OCI layout.")
    ] = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Take SOURCE, verified, into the store.

    SOURCE is an OCI layout (FOLDER or FOLDER:TAG) of a ModelPack model, what `export` wrote, or a checkpoint: a folder
    or s3://BUCKET/PREFIX.
    What llmopt made comes back as the same artifact, anything else as a model without a history.
    """
    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    from llmopt.artifacts import exchange
    from llmopt.artifacts.layout import check_name

    if name is not None:
        check_name(name)
    taken = exchange.take(session.store, source, digest=digest, progress=session.console.progress)
    manifest = taken.manifest
    if name is not None:
        session.store.set_name(name, manifest.id)
    if taken.left_out:
        listed = ", ".join(f"`{path}`" for path in taken.left_out[:5])
        more = f" and {len(taken.left_out) - 5} more" if len(taken.left_out) > 5 else ""
        session.console.progress(f"left out, since nothing reads them: {listed}{more}")
    for other in _other_results(session.store, manifest):
        session.console.progress(f"the same action also gave `{other}` here; from now on it is found as what came in")
    session.console.result(
        f"{source} {manifest.id}",
        {
            "artifact": manifest.id,
            "action": manifest.action.key if manifest.action else None,
            "kind": manifest.kind,
            "status": manifest.status,
            "name": name,
            "bytes": manifest.size,
            "attestations": taken.attestations,
            "left_out": list(taken.left_out),
        },
    )


def _other_results(store: Store, manifest: Manifest) -> list[str]:
    action = manifest.action
    return [] if action is None else [found for found in store.results(action.key) if found != manifest.id]
