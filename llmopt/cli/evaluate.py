"""`llmopt eval`: how good a model is, and how far from its base."""

from __future__ import annotations

from typing import Annotated

from llmopt.cli import options as opt


def evaluate(
    model: Annotated[str, opt.argument(metavar="MODEL")],
    against: Annotated[
        str | None,
        opt.option("--against", metavar="BASE", help="The model it was made from, for KL and top-1 agreement."),
    ] = None,
    profile: opt.Profile = None,
    text: Annotated[
        str | None, opt.option("--text", metavar="FILE", help="Text to predict; by default that of the package.")
    ] = None,
    windows: Annotated[
        int | None, opt.option("--windows", metavar="N", help="Stretches of text, from its start.")
    ] = None,
    seq_len: Annotated[int | None, opt.option("--seq-len", metavar="L", help="Tokens in each of them.")] = None,
    tasks: Annotated[
        str | None,
        opt.option("--tasks", metavar="NAME[,NAME]", help="Ask these tasks of lm-evaluation-harness too."),
    ] = None,
    tasks_path: Annotated[
        str | None,
        opt.option("--tasks-path", metavar="DIR", help="Tasks of your own; files they name are relative to it."),
    ] = None,
    limit: Annotated[int | None, opt.option("--limit", metavar="N", help="Documents of each task.")] = None,
    fewshot: Annotated[
        int | None, opt.option("--fewshot", metavar="K", help="Examples before each question; by default the task's.")
    ] = None,
    out: opt.Out = None,
    name: opt.Name = None,
    sign_key: opt.SignKey = None,
    remote: opt.Remote = None,
    push: opt.Push = False,
    verify: opt.Verify = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    json_lines: opt.JsonLines = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure MODEL's perplexity and, against a base, KL divergence and top-1 agreement.

    With --tasks also what lm-evaluation-harness asks (`pip install 'llmopt[lm-eval]'`).
    """
    from llmopt.cli.deliver import Delivery
    from llmopt.pipeline import inputs, runner, stages

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
    delivery = Delivery(session, out=out, name=name)
    base = None if against is None else inputs.model(session.store, against, session.console.progress)
    settings = opt.settings(
        profile,
        "eval",
        text=text,
        windows=windows,
        seq_len=seq_len,
        tasks=None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()],
        tasks_path=tasks_path,
        limit=limit,
        fewshot=fewshot,
    )
    stage = stages.evaluate(inputs.model(session.store, model, session.console.progress), base, settings)
    delivery.deliver(runner.run(session.store, stage, session.console.progress))
