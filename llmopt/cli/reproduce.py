"""`llmopt reproduce`: an artifact made again, and compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from llmopt.cli import options as opt
from llmopt.errors import Exit

if TYPE_CHECKING:
    from llmopt.pipeline.reproduce import Reproduced


def reproduce(
    artifact: Annotated[str, opt.argument(metavar="ARTIFACT")],
    model: Annotated[
        list[str] | None,
        opt.option("--model", metavar="REF", help="An input that the store lacks: a folder, a text, or ORG/NAME."),
    ] = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    json_lines: opt.JsonLines = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Make ARTIFACT again from what its manifest says, and compare. Exits with 4 where its files come out other.

    Its inputs are taken from the store, from the hub at the commit they were fetched at, or from --model. The store
    stays as it is, but for a different result of the same action: that is kept, and shown as not reproducible.
    """
    from llmopt.cli.references import resolve
    from llmopt.pipeline.reproduce import reproduce as again

    session = opt.session(store, json=json, json_lines=json_lines, quiet=quiet, verbose=verbose)
    found = again(session.store, resolve(session.store, artifact), session.console.progress, given=model or ())
    session.console.result("\n".join(_lines(found)), found.to_json())
    return int(Exit.OK if found.same else Exit.VERIFICATION_FAILED)


def _lines(found: Reproduced) -> Iterator[str]:
    yield f"artifact  {found.artifact}"
    yield f"again     {found.remade}"
    yield {
        "identical": "identical: the same files by the same action",
        "same files": "the same files, by another action" if found.action != found.remade_action else "the same files",
        "different": "different files",
    }[found.outcome]
    yield from (f"file      {line}" for line in found.files)
    yield from (f"other     {line}" for line in found.otherwise)
    if found.kept:
        yield "not reproducible: the same action has given different results; the store has them all now"
