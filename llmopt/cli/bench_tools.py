"""What goes with `llmopt bench`: how true the client is here, how much noise there is, what changed and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmopt.cli import bench as load
from llmopt.cli import options as opt
from llmopt.errors import Exit, SettingsError, nearest

if TYPE_CHECKING:
    from llmopt.pipeline.history import Report


def selftest(
    concurrency: Annotated[
        str | None, opt.option("--concurrency", metavar="N,N", help="Streams at once [16,256].")
    ] = None,
    rate: Annotated[str | None, opt.option("--rate", metavar="R,R", help="Requests a second, open loop [200].")] = None,
    json: opt.Json = False,
    json_lines: opt.JsonLines = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Measure the load client itself, against a server that knows when it sent what. Exits with 6 where it is not true.

    The server comes with llmopt and runs here, on a core of its own where there is one.
    """
    from llmopt.bench import selftest as test

    session = opt.session(None, json=json, json_lines=json_lines, quiet=quiet, verbose=verbose)
    streams, rates = opt.integers("--concurrency", concurrency), opt.numbers("--rate", rate)
    chosen: dict[str, Any] = {}
    if streams is not None or rates is not None:
        chosen = {"streams": streams or (), "rates": rates or ()}
    result = test.run(session.console.progress, **chosen)
    session.console.result(test.table(result), result)
    return int(Exit.OK if result["true"] else Exit.MEASUREMENT_INVALID)


def calibrate(
    subject: Annotated[str, opt.argument(metavar="SUBJECT")],
    profile: opt.Profile = None,
    concurrency: load.Concurrency = None,
    rate: load.Rate = None,
    requests: load.Requests = None,
    duration: load.Duration = None,
    workload: load.Workload = None,
    prompt_tokens: load.PromptTokens = None,
    output_tokens: load.OutputTokens = None,
    warmup: load.Warmup = None,
    rounds: Annotated[int, opt.option("--rounds", metavar="N", help="Rounds of both.", show_default=True)] = 12,
    margin: load.Margin = None,
    endpoint: load.Endpoint = None,
    seed: opt.Seed = None,
    timeout: load.Timeout = None,
    model: load.Model = None,
    tokenizer: load.Tokenizer = None,
    name: opt.Name = None,
    out: opt.Out = None,
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
    """Load SUBJECT against itself, and say how much noise there is here and what change a gate would find in it.

    Give the options of the bench that is to be gated. The report is stored as any other.
    """
    from llmopt.bench.gate.calibrate import calibrate as from_rounds
    from llmopt.bench.gate.verdict import LEAST_ROUNDS
    from llmopt.bench.report.folder import read_report, rounds_of
    from llmopt.bench.settings import share
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
    if rounds < LEAST_ROUNDS:
        raise SettingsError(f"{rounds} rounds tell no noise", hint=f"give `--rounds` of {LEAST_ROUNDS} at the least")
    delivery = Delivery(session, out=out, name=name, anew=True)
    settings = opt.settings(
        profile,
        "bench",
        concurrency=opt.integers("--concurrency", concurrency),
        rate=opt.numbers("--rate", rate),
        requests=requests,
        duration_s=duration,
        workload=workload,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        warmup=warmup,
        rounds=rounds,
        max_rounds=rounds,
        endpoint=endpoint,
        seed=seed,
        timeout_s=timeout,
        model=model,
    )
    subjects = {
        side: inputs.subject(session.store, subject, session.console.progress) for side in ("candidate", "baseline")
    }
    vocabulary = None if tokenizer is None else inputs.resolve(session.store, tokenizer)
    stage = stages.bench(subjects, settings | {"gate": False}, tokenizer=vocabulary, store=session.store)
    result = runner.run(session.store, stage, session.console.progress, anew=True, keep=delivery.keep)
    report = read_report(Path(result.path))
    found = from_rounds(
        rounds_of(report), margin=0.05 if margin is None else share(margin, "margin"), seed=report["settings"]["seed"]
    )
    delivery.deliver(result, "\n".join(found.lines()), {"calibration": found.to_json()})
    return int(Exit.OK)


def history(
    report: Annotated[str | None, opt.argument(metavar="[REPORT]")] = None,
    metrics: Annotated[
        str | None, opt.option("--metrics", metavar="F,F", help="Which figures [those that a gate compares].")
    ] = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Show how the stored load tests like REPORT (or the newest) went over time, and where a figure changed for good.

    Alike are those of the same settings on the same machine, whatever was loaded.
    """
    from llmopt.bench.gate.names import GATED
    from llmopt.pipeline import history as stored
    from llmopt.pipeline import inputs

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    found = stored.reports(session.store, None if report is None else inputs.resolve(session.store, report).id)
    series = stored.series(found, GATED if metrics is None else [metric.strip() for metric in metrics.split(",")])
    lines = []
    for one in series:
        first, last = _day(one.reports[0]), _day(one.reports[-1])
        when = first if first == last else f"{first} to {last}"
        count = f"{len(one.values)} report{'' if len(one.values) == 1 else 's'}"
        lines.append(f"{one.level} {one.metric}: {count}, {when}, now {one.values[-1]:g}")
        for change in one.changes:
            at = one.reports[change.index]
            figures = f"{change.before:.4g} -> {change.after:.4g}"
            lines.append(f"  {change.change:+.1%} from {at.artifact[:19]} of {_day(at)} on: {figures}")
        if not one.changes:
            lines.append("  no change")
    session.console.result("\n".join(lines), {"reports": len(found), "series": [one.to_json() for one in series]})
    return int(Exit.OK)


def _day(report: Report) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(report.created_s))


def import_(
    files: Annotated[list[str], opt.argument(metavar="FILE...")],
    baseline: load.Baseline = None,
    gate: Annotated[bool, opt.option("--gate", help="Let the comparison decide the exit code: 0, 5 or 7.")] = False,
    margin: load.Margin = None,
    gate_metrics: Annotated[
        str | None, opt.option("--gate-metrics", metavar="F,F", help="What --gate compares, as `ttft_ms_p50`.")
    ] = None,
    slo: load.Slo = None,
    junit: Annotated[str | None, opt.option("--junit", metavar="FILE", help="Also write JUnit XML there.")] = None,
    html: Annotated[str | None, opt.option("--html", metavar="FILE", help="Also write the page there.")] = None,
    csv: Annotated[str | None, opt.option("--csv", metavar="FILE", help="Also write the table there.")] = None,
    out: opt.Out = None,
    name: opt.Name = None,
    sign_key: opt.SignKey = None,
    remote: opt.Remote = None,
    push: opt.Push = False,
    verify: opt.Verify = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Make a report of FILE, a result of `vllm bench serve`, guidellm or aiperf, and judge it as our own are.

    Several files of one tool at one load are rounds of it.

    Each figure follows the convention of the tool that measured it, and the report says which.
    """
    from llmopt.bench.report.folder import read_report
    from llmopt.cli import verdict
    from llmopt.cli.deliver import Delivery
    from llmopt.pipeline import inputs, runner, stages

    session = opt.session(
        store, json=json, quiet=quiet, verbose=verbose, sign_key=sign_key, remote=remote, push=push, verify=verify
    )
    delivery = Delivery(session, out=out, name=name)
    forms = verdict.Forms(session, junit=junit, html=html, csv=csv)
    given: Mapping[str, Any] = {
        "gate": gate,
        "margin": margin,
        "slo": slo,
        "gate_metrics": None if gate_metrics is None else gate_metrics.split(","),
    }
    stage = stages.import_bench(
        [inputs.text(file, kind="results") for file in files],
        {key: value for key, value in given.items() if value is not None},
        baseline=inputs.report(session.store, baseline),
    )

    def keep(staged: Path) -> None:
        forms.deliver(staged)
        delivery.keep(staged)

    result = runner.run(session.store, stage, session.console.progress, keep=keep)
    delivery.deliver(result, verdict.text(read_report(Path(result.path))))
    forms.deliver(Path(result.path))
    return verdict.exit_code(result.metrics)


#: Subcommands of `llmopt bench`, which takes an argument itself: name -> (function, what it does).
TOOLS: Mapping[str, tuple[Callable[..., int], str]] = {
    "selftest": (selftest, "Measure the load client itself."),
    "calibrate": (calibrate, "Measure the noise, and what can be found in it."),
    "history": (history, "Show where stored figures changed."),
    "import": (import_, "Judge results of other load testers."),
}


def slip(word: str) -> str | None:
    """A hint for a word that is all but the name of a subcommand."""
    hint = nearest(word, TOOLS)
    return hint.replace("`", "`llmopt bench ", 1) if hint.startswith("did you mean") else None
