"""`llmopt bench`: load-test an engine or a server; `bench selftest`, `calibrate`, `history` and `import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmopt.cli import options as opt
from llmopt.errors import LlmoptError, SettingsError

if TYPE_CHECKING:
    from llmopt.pipeline.inputs import Input

if TYPE_CHECKING:
    pass

Against = Annotated[str | None, opt.option("--against", metavar="X", help="Another subject, loaded in turn with it.")]
Baseline = Annotated[
    str | None, opt.option("--baseline", metavar="REPORT", help="A stored report to judge by: id, name or folder.")
]
Concurrency = Annotated[
    str | None, opt.option("--concurrency", metavar="N,N", help="Streams at once, one level after another.")
]
Rate = Annotated[str | None, opt.option("--rate", metavar="R,R", help="Requests a second instead: an open loop.")]
Requests = Annotated[int | None, opt.option("--requests", metavar="N", help="At each level, in each round.")]
Duration = Annotated[
    float | None, opt.option("--duration", metavar="S", help="Start no request after so many seconds.")
]
Workload = Annotated[
    str | None,
    opt.option("--workload", metavar="W", help="chat, rag, code, summarise, agent; a YAML, a trace, or your own rows."),
]
PromptTokens = Annotated[int | None, opt.option("--prompt-tokens", metavar="N", help="Length of each prompt.")]
OutputTokens = Annotated[int | None, opt.option("--output-tokens", metavar="N", help="Length of each answer.")]
Warmup = Annotated[
    int | None, opt.option("--warmup", metavar="N", help="Requests before each level that do not count.")
]
Rounds = Annotated[int | None, opt.option("--rounds", metavar="N", help="Do it all so often [--gate: 12].")]
Endpoint = Annotated[
    str | None,
    opt.option("--endpoint", metavar="E", help="completions (the default), chat, responses, triton, sagemaker, tgi."),
]
Timeout = Annotated[float | None, opt.option("--timeout", metavar="S", help="For one request.")]
Model = Annotated[
    str | None,
    opt.option("--model", metavar="NAME", help="What to ask a server for; by default the first that it lists."),
]
Tokenizer = Annotated[
    str | None, opt.option("--tokenizer", metavar="DIR", help="A server's model, for prompts of an exact length.")
]
Slo = Annotated[
    list[str] | None,
    opt.option("--slo", metavar="F<=X", help="A threshold, as `ttft_p99_ms<=200` or `goodput>=95%`; exits with 5."),
]
Margin = Annotated[str | None, opt.option("--margin", metavar="P", help="What may be worse and still pass [5%].")]


def bench(
    subject: Annotated[str, opt.argument(metavar="SUBJECT")],
    against: Against = None,
    baseline: Baseline = None,
    profile: opt.Profile = None,
    concurrency: Concurrency = None,
    rate: Rate = None,
    arrivals: Annotated[
        str | None, opt.option("--arrivals", metavar="A", help="Of --rate: poisson (the default), constant, gamma.")
    ] = None,
    burstiness: Annotated[
        float | None, opt.option("--burstiness", metavar="B", help="Of gamma: below 1 in bursts, above 1 more even.")
    ] = None,
    sweep: Annotated[
        str | None,
        opt.option(
            "--sweep", metavar="KIND", help="concurrency or rate: find the knee, and the most that meets --slo."
        ),
    ] = None,
    ramp: Annotated[
        float | None, opt.option("--ramp", metavar="S", help="Let the load grow over so many seconds.")
    ] = None,
    speed: Annotated[float | None, opt.option("--speed", metavar="X", help="Of a trace: 2 is twice as fast.")] = None,
    in_flight: Annotated[
        int | None, opt.option("--in-flight", metavar="N", help="Open loop: no more requests at once.")
    ] = None,
    requests: Requests = None,
    duration: Duration = None,
    workload: Workload = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    prefix_tokens: Annotated[
        int | None, opt.option("--prefix-tokens", metavar="N", help="A beginning that prompts share.")
    ] = None,
    turns: Annotated[int | None, opt.option("--turns", metavar="N", help="Of each conversation.")] = None,
    warmup: Warmup = None,
    warmup_time: Annotated[
        float | None, opt.option("--warmup-time", metavar="S", help="Of each load, counted in no figure.")
    ] = None,
    cooldown_time: Annotated[
        float | None, opt.option("--cooldown-time", metavar="S", help="The same at its end.")
    ] = None,
    rounds: Rounds = None,
    gate: Annotated[
        bool | None, opt.option("--gate", help="Let the comparison decide the exit code: 0, 5 or 7.")
    ] = None,
    margin: Margin = None,
    max_rounds: Annotated[
        int | None, opt.option("--max-rounds", metavar="N", help="Of --gate, while it cannot tell [4 x rounds].")
    ] = None,
    gate_metrics: Annotated[
        str | None, opt.option("--gate-metrics", metavar="F,F", help="What --gate compares, as `ttft_ms_p50`.")
    ] = None,
    slo: Slo = None,
    endpoint: Endpoint = None,
    seed: opt.Seed = None,
    timeout: Timeout = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    header: Annotated[
        list[str] | None, opt.option("--header", metavar="H", help="`Name: $VARIABLE`, sent with every request.")
    ] = None,
    in_process: Annotated[
        bool | None, opt.option("--in-process", help="An engine without its HTTP server, to tell that apart.")
    ] = None,
    processes: Annotated[
        int | None, opt.option("--processes", metavar="N", help="Of the client [1, more when a core is not enough].")
    ] = None,
    junit: Annotated[str | None, opt.option("--junit", metavar="FILE", help="Also write JUnit XML there.")] = None,
    html: Annotated[str | None, opt.option("--html", metavar="FILE", help="Also write the page there.")] = None,
    csv: Annotated[str | None, opt.option("--csv", metavar="FILE", help="Also write the table there.")] = None,
    out: Annotated[
        str | None, opt.option("--out", "--report", metavar="DIR", help="Also copy the report into this folder.")
    ] = None,
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
) -> int:
    """Load-test SUBJECT: an engine (folder, s3://..., id or name), or the URL of a server (several: commas between).

    Always measures anew, and stores the report. An engine is served here for as long as that takes. Exits with 5 where
    a threshold or the gate fails, 6 where the measurement means nothing, 7 where the gate cannot tell.

    See also `llmopt bench selftest`, `bench calibrate`, `bench history` and `bench import`.
    """
    from llmopt.bench.report.folder import read_report
    from llmopt.cli import verdict
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
    delivery = Delivery(session, out=out, name=name, anew=True)
    forms = verdict.Forms(session, junit=junit, html=html, csv=csv)
    subjects = {"candidate": _subject(session, subject)}
    if against is not None:
        subjects["baseline"] = inputs.subject(session.store, against, session.console.progress)
    settings = opt.settings(
        profile,
        "bench",
        concurrency=opt.integers("--concurrency", concurrency),
        rate=opt.numbers("--rate", rate),
        arrivals=arrivals,
        burstiness=burstiness,
        sweep=sweep,
        ramp_s=ramp,
        speed=speed,
        in_flight=in_flight,
        requests=requests,
        duration_s=duration,
        workload=workload,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefix_tokens=prefix_tokens,
        turns=turns,
        warmup=warmup,
        warmup_s=warmup_time,
        cooldown_s=cooldown_time,
        rounds=rounds,
        gate=gate,
        margin=margin,
        max_rounds=max_rounds,
        gate_metrics=None if gate_metrics is None else gate_metrics.split(","),
        slo=slo,
        endpoint=endpoint,
        seed=seed,
        timeout_s=timeout,
        model=model,
        headers=header,
        in_process=in_process,
        processes=processes,
    )
    stage = stages.bench(
        subjects,
        settings,
        tokenizer=None if tokenizer is None else inputs.resolve(session.store, tokenizer, session.console.progress),
        baseline=inputs.report(session.store, baseline or settings.get("baseline")),
        store=session.store,
    )

    def keep(staged: Path) -> None:
        forms.deliver(staged)
        delivery.keep(staged)

    result = runner.run(session.store, stage, session.console.progress, anew=True, keep=keep)
    delivery.deliver(result, verdict.text(read_report(Path(result.path))))
    forms.deliver(Path(result.path))
    return verdict.exit_code(result.metrics)


def _subject(session: opt.Session, reference: str) -> Input | str:
    """What to load; a word that names nothing here and is all but the name of a subcommand is a slip."""
    from llmopt.cli.bench_tools import slip
    from llmopt.pipeline import inputs

    try:
        return inputs.subject(session.store, reference, session.console.progress)
    except LlmoptError as error:
        hint = slip(reference)
        if type(error) is not LlmoptError or hint is None:
            raise
        raise SettingsError(f"no such command `bench {reference}`", hint=hint) from None
