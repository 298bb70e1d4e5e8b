"""`llmopt run`: a whole pipeline, of which only what the store lacks is done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from llmopt.cli import options as opt
from llmopt.errors import Exit


def run(
    pipeline: Annotated[str, opt.argument(metavar="PIPELINE")],
    overrides: Annotated[
        list[str] | None,
        opt.option(
            "--set", envvar="LLMOPT_RUN_SET", metavar="KEY=VALUE", help="As in `quantize.bits=3`, `model=FOLDER`."
        ),
    ] = None,
    dry_run: Annotated[bool, opt.option("--dry-run", help="Only say what is in the store and what is to do.")] = False,
    explain: Annotated[bool, opt.option("--explain", help="Say why a stage is not in the store.")] = False,
    out: Annotated[
        str | None,
        opt.option("--out", metavar="DIR", help="Also copy each stage's artifact into a folder of this one."),
    ] = None,
    builder: opt.Builder = None,
    sign_key: opt.SignKey = None,
    remote: opt.Remote = None,
    push: opt.Push = False,
    verify: opt.Verify = None,
    deny_license: opt.DenyLicense = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    json_lines: opt.JsonLines = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Quantize, compile, evaluate and load-test a model as PIPELINE says: a YAML file, a shipped profile, or LMI's
    serving.properties.

    Only what the store does not have is done.
    """
    from llmopt.artifacts.objects import is_s3
    from llmopt.cli import summary
    from llmopt.cli.deliver import check_destination, copy_to, keep_report
    from llmopt.pipeline import plan

    session = opt.session(
        store,
        json=json,
        json_lines=json_lines,
        quiet=quiet,
        verbose=verbose,
        sign_key=sign_key,
        remote=remote,
        push=push,
        verify=verify,
    )
    wanted = plan.load(pipeline, overrides or ())
    folders = {} if out is None or dry_run else {name: f"{out.rstrip('/')}/{name}" for name in wanted.steps}
    for folder in folders.values():
        check_destination(folder)

    def keep(step: str, staged: Path) -> None:
        folder = folders.get(step)
        keep_report(staged, None if folder is None or is_s3(folder) else Path(folder), session.console.progress)

    result = plan.run(
        session.store,
        wanted,
        session.console.progress,
        dry_run=dry_run,
        why=explain,
        keep=keep,
        builder=opt.builder(builder),
        deny=deny_license or (),
    )
    for step in result.steps:
        if step.name in folders and step.result is not None:
            copy_to(session.store, step.result.artifact, folders[step.name], session.console.progress)
    session.console.result(summary.planned(result) if dry_run else summary.text(result), summary.value(result))
    return int(Exit.OK) if dry_run else summary.exit_code(result)
