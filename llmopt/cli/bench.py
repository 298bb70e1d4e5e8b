"""`llmopt bench`: load-test an engine or a server."""

from __future__ import annotations

from typing import Annotated

from llmopt.cli import options as opt


def bench(
    subject: Annotated[str, opt.argument(metavar="SUBJECT")],
    against: Annotated[
        str | None, opt.option("--against", metavar="X", help="Another subject, loaded alike in the same run.")
    ] = None,
    profile: opt.Profile = None,
    concurrency: Annotated[
        str | None, opt.option("--concurrency", metavar="N,N", help="Streams at once, one level after another.")
    ] = None,
    requests: Annotated[int | None, opt.option("--requests", metavar="N", help="At each level, in each round.")] = None,
    duration: Annotated[
        float | None, opt.option("--duration", metavar="S", help="Start no request after so many seconds.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, opt.option("--prompt-tokens", metavar="N", help="Length of each prompt.")
    ] = None,
    output_tokens: Annotated[
        int | None, opt.option("--output-tokens", metavar="N", help="Length of each answer.")
    ] = None,
    warmup: Annotated[
        int | None, opt.option("--warmup", metavar="N", help="Requests before each level that do not count.")
    ] = None,
    rounds: Annotated[
        int | None, opt.option("--rounds", metavar="N", help="Do it all so often, subjects in random order.")
    ] = None,
    endpoint: Annotated[
        str | None, opt.option("--endpoint", metavar="E", help="completions (the default) or chat.")
    ] = None,
    seed: opt.Seed = None,
    timeout: Annotated[float | None, opt.option("--timeout", metavar="S", help="For one request.")] = None,
    model: Annotated[
        str | None,
        opt.option("--model", metavar="NAME", help="What to ask a server for; by default the first that it lists."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        opt.option("--tokenizer", metavar="DIR", help="A server's model, for prompts of an exact length."),
    ] = None,
    out: opt.Out = None,
    name: opt.Name = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    json_lines: opt.JsonLines = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Load-test SUBJECT: an engine (folder, id or name), or the URL of an OpenAI-compatible server.

    Always measures anew, and stores the report. An engine is served here for as long as that takes.
    """
    from llmopt.cli.deliver import Delivery
    from llmopt.pipeline import inputs, runner, stages

    session = opt.session(store, json=json, json_lines=json_lines, quiet=quiet, verbose=verbose)
    delivery = Delivery(session, out=out, name=name)
    subjects = {"candidate": inputs.subject(session.store, subject)}
    if against is not None:
        subjects["baseline"] = inputs.subject(session.store, against)
    vocabulary = None if tokenizer is None else inputs.resolve(session.store, tokenizer)
    settings = opt.settings(
        profile,
        "bench",
        concurrency=opt.integers("--concurrency", concurrency),
        requests=requests,
        duration_s=duration,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        warmup=warmup,
        rounds=rounds,
        endpoint=endpoint,
        seed=seed,
        timeout_s=timeout,
        model=model,
    )
    stage = stages.bench(subjects, settings, tokenizer=vocabulary)
    delivery.deliver(runner.run(session.store, stage, session.console.progress, anew=True, keep=delivery.keep))
