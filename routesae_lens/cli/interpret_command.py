"""``routesae-lens interpret`` and ``routesae-lens agreement``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routesae_lens.cli.shared import RUN, one_line_errors

if TYPE_CHECKING:
    from routesae_lens.analysis.feature_set import FeatureSet
    from routesae_lens.report.interpretations import Interpretations
    from routesae_lens.report.judges import Judge

JUDGE, SAMPLE, COST = "The judge", "The sample", "The cost"


def interpret(
    features: Annotated[
        list[Path], typer.Argument(help="Files that FeatureSet.save wrote, one for each SAE.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help='The judge: a model of the endpoint; with --local a hub name, folder or "demo".',
            rich_help_panel=JUDGE,
        ),
    ] = None,
    local: Annotated[
        bool,
        typer.Option(
            "--local", help="Run the judge on this machine, by transformers.", rich_help_panel=JUDGE
        ),
    ] = False,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible endpoint; $OPENAI_BASE_URL or OpenAI by default.", rich_help_panel=JUDGE
        ),
    ] = None,
    key_env: Annotated[
        str,
        typer.Option(help="Environment variable that holds the key for the endpoint.", rich_help_panel=JUDGE),
    ] = "OPENAI_API_KEY",
    temperature: Annotated[
        str, typer.Option(help='Of the answers; "none" leaves it to the endpoint.', rich_help_panel=JUDGE)
    ] = "0",
    max_tokens: Annotated[
        str | None,
        typer.Option(
            help='Longest answer, 500 (--local: 200) by default; "none" leaves it to the endpoint.',
            rich_help_panel=JUDGE,
        ),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            help="More of the request, NAME=JSON, for instance reasoning_effort='\"low\"'. May be repeated.",
            rich_help_panel=JUDGE,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="With --local: cpu, cuda, ...", rich_help_panel=JUDGE)
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.", rich_help_panel=RUN)] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds for one try.", rich_help_panel=RUN)] = 60.0,
    tries: Annotated[int, typer.Option(help="For one answer, with back-off.", rich_help_panel=RUN)] = 6,
    n: Annotated[int, typer.Option(help="Features drawn of each SAE; 0: all.", rich_help_panel=SAMPLE)] = 100,
    seed: Annotated[int, typer.Option(help="Of the drawing.", rich_help_panel=SAMPLE)] = 0,
    max_contexts: Annotated[
        int | None,
        typer.Option(
            help="Contexts shown of each feature, strongest first; all by default.", rich_help_panel=SAMPLE
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for <sae name>.json.", rich_help_panel=RUN)] = Path(
        "interpretations"
    ),
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps all answers; in the user's cache by default.", rich_help_panel=RUN
        ),
    ] = None,
    retry_unparsed: Annotated[
        bool,
        typer.Option(
            "--retry-unparsed", help="Ask again where an answer was unreadable.", rich_help_panel=RUN
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the prompts and what they cost; ask nobody.", rich_help_panel=COST
        ),
    ] = False,
    input_price: Annotated[
        float | None, typer.Option(help="Of a million prompt tokens.", rich_help_panel=COST)
    ] = None,
    output_price: Annotated[
        float | None, typer.Option(help="Of a million answered tokens.", rich_help_panel=COST)
    ] = None,
    form: Annotated[
        Path | None,
        typer.Option(
            help="Write a CSV form for people with the same sample to this file, and ask no judge.",
            rich_help_panel=RUN,
        ),
    ] = None,
    debug: Annotated[bool, typer.Option(help="Show the traceback of errors.", rich_help_panel=RUN)] = False,
) -> None:
    """Ask a language model what features mean, and how clear they are. Stopped, the same command goes on.

    Answers are kept on disk and never paid twice.
    """
    from routesae_lens.analysis.feature_set import FeatureSet
    from routesae_lens.report.interpret import estimate_interpretation, feature_prompts
    from routesae_lens.report.interpret import interpret as run
    from routesae_lens.report.people_form import write_form
    from routesae_lens.report.prompt import one_line

    sample: dict[str, Any] = {"n": n or None, "seed": seed, "max_contexts": max_contexts}
    incomplete = 0
    with one_line_errors(debug):
        sets = [FeatureSet.load(path) for path in features]
        _check_names(sets)
        if form is not None:
            if len(sets) != 1:
                raise ValueError(f"--form takes the features of one SAE, got {len(sets)} files")
            typer.echo(f"form: {write_form(sets[0], form, **sample)}")
            return
        prices = _prices(input_price, output_price)
        judge: Judge
        if model is None:
            raise ValueError("--model is missing: the model that is asked")
        if local:
            judge = _local_judge(model, base_url, temperature, max_tokens, parameter, device)
        else:
            judge = _endpoint_judge(
                model, base_url, key_env, temperature, max_tokens, parameter, concurrency, timeout, tries
            )
        asking: dict[str, Any] = {**sample, "answers": answers, "retry_unparsed": retry_unparsed}
        for one in sets:
            estimate = estimate_interpretation(one, judge, **asking)
            line = f"{one_line(one.name)}: {estimate}"
            if prices is not None:
                cost = estimate.cost(*prices)
                line += "; cost without limit" if cost is None else f"; cost at most about {cost:.4f}"
            if dry_run:
                for latent, prompt in feature_prompts(one, **sample).items():
                    typer.echo(f"=== latent {latent}, {judge.count_tokens(prompt)} tokens ===\n{prompt}")
            typer.echo(line)
        if dry_run:
            return
        try:
            for one in sets:
                result = run(one, judge, **asking, output=output)
                incomplete += len(result.failed)
                typer.echo(result.summary())
                typer.echo(_paid(result, prices))
        except KeyboardInterrupt:
            typer.echo("Stopped. What was answered is kept; the same command asks for the rest.", err=True)
            raise typer.Exit(130) from None
    if incomplete:
        typer.echo(f"{incomplete} features failed (see the file); the same command asks again.", err=True)
        raise typer.Exit(1)


def agreement(
    first: Annotated[Path, typer.Argument(help="Interpretations (.json), or a form filled in (.csv).")],
    second: Annotated[Path, typer.Argument(help="The same features by another judge, or by people.")],
    plot: Annotated[Path | None, typer.Option(help="Draw figure 7 of the paper into this file.")] = None,
    debug: Annotated[bool, typer.Option(help="Show the traceback of errors.")] = False,
) -> None:
    """Compare two judges, or a judge and people: categories with Cohen's kappa, and scores."""
    from routesae_lens.report.agreement import agreement as compare
    from routesae_lens.report.agreement import plot_agreement
    from routesae_lens.report.interpretations import Interpretations
    from routesae_lens.report.people_form import read_form

    with one_line_errors(debug):
        said = [
            read_form(path, path.stem) if path.suffix == ".csv" else Interpretations.load(path)
            for path in (first, second)
        ]
        found = compare(said[0], said[1])
        typer.echo(str(found))
        if plot is not None:
            plot_agreement(found, plot)


def _check_names(sets: list[FeatureSet]) -> None:
    names = [one.name for one in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several files hold features of {twice}; their results would have one name")


def _local_judge(
    model: str,
    base_url: str | None,
    temperature: str,
    max_tokens: str | None,
    parameter: list[str] | None,
    device: str | None,
) -> Judge:
    from routesae_lens.report.local_judge import LocalJudge

    if base_url is not None or parameter:
        raise ValueError("--base-url and --parameter belong to an endpoint, not to --local")
    warmth, longest = _number("--temperature", temperature), _whole("--max-tokens", max_tokens or "200")
    if warmth is None or longest is None:
        raise ValueError("--local needs a --temperature and --max-tokens, got none")
    return LocalJudge(model, temperature=warmth, max_tokens=longest, device=device)


def _endpoint_judge(
    model: str,
    base_url: str | None,
    key_env: str,
    temperature: str,
    max_tokens: str | None,
    parameter: list[str] | None,
    concurrency: int,
    timeout: float,
    tries: int,
) -> Judge:
    from routesae_lens.report.endpoint_judge import EndpointJudge

    parameters: dict[str, Any] = {}
    for pair in parameter or []:
        name, equals, value = pair.partition("=")
        try:
            if not (name and equals):
                raise ValueError("no name, or no =")
            parameters[name] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"--parameter must be NAME=JSON, got {pair!r}: {error}") from None
    return EndpointJudge(
        model,
        base_url,
        key_env,
        temperature=_number("--temperature", temperature),
        max_tokens=_whole("--max-tokens", max_tokens or "500"),
        parameters=parameters,
        concurrency=concurrency,
        timeout=timeout,
        tries=tries,
    )


def _number(option: str, text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f'{option} must be a number or "none", got {text!r}') from None


def _whole(option: str, text: str) -> int | None:
    value = _number(option, text)
    if value is not None and not value.is_integer():
        raise ValueError(f"{option} must be a whole number, got {text!r}")
    return None if value is None else int(value)


def _prices(input_price: float | None, output_price: float | None) -> tuple[float, float] | None:
    if input_price is None and output_price is None:
        return None
    if input_price is None or output_price is None:
        raise ValueError("give both --input-price and --output-price, or neither")
    if not (0 <= input_price < math.inf and 0 <= output_price < math.inf):
        raise ValueError(f"prices must be 0 or more, got {input_price} and {output_price}")
    return input_price, output_price


def _paid(result: Interpretations, prices: tuple[float, float] | None) -> str:
    paid = result.paid
    line = f"  asked now: {paid.answers} answers, {paid.prompt_tokens:,} + {paid.completion_tokens:,} tokens"
    if paid.answers_without_usage:
        line += f" ({paid.answers_without_usage} answers came without a count)"
    return line if prices is None else f"{line}, cost {paid.cost(*prices):.4f}"
