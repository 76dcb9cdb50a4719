"""The commands and their options: nothing but the grammar, imports inside the commands (process D).

`lessons` and `hooks` have files of their own; what all share is in `grammar`.
The set of options is frozen by tests/cli/options.txt; docs/reference/cli.md describes each.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from secondnature.cli.app_hooks import hooks_app
from secondnature.cli.app_lessons import lessons_app
from secondnature.cli.grammar import HomeOption, JsonOption, ModelOption, ProbesOption, UrlOption, command

__all__ = ["app"]

app = typer.Typer(
    help="Correct your model once; it stays corrected, while it keeps serving.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(lessons_app, name="lessons")
app.add_typer(hooks_app, name="hooks")


class Objective(StrEnum):
    """What a training step minimises."""

    sft = "sft"
    orpo = "orpo"
    dpo = "dpo"
    dpop = "dpop"
    sdft = "sdft"


class Turns(StrEnum):
    """Which answers of a conversation are taught."""

    last = "last"
    all = "all"


class Engine(StrEnum):
    """What generates the answers."""

    local = "local"
    vllm = "vllm"


def _version(wanted: bool) -> None:
    if wanted:
        from secondnature import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Correct your model once; it stays corrected, while it keeps serving."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@command
def serve(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As --model; then options of vLLM, if that is it.")
    ] = None,
    model_option: ModelOption = None,
    port: Annotated[int | None, typer.Option("--port", help="Default 8321; 0: any free one.")] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on. Default 127.0.0.1: this machine only.")
    ] = None,
    home: HomeOption = None,
    engine: Annotated[
        Engine | None, typer.Option("--engine", help="What generates. Default: the home's, else local.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, or cuda: engine and trainer on a GPU. Default cpu.")
    ] = None,
    train_threads: Annotated[
        int | None, typer.Option("--train-threads", help="Threads of the trainer.")
    ] = None,
    share: Annotated[
        float | None, typer.Option("--share", help="Of the time that the trainer works under load, 0 to 1.")
    ] = None,
) -> int:
    """Serve a model, and learn beside it, until ctrl-C."""
    import os
    import signal

    from secondnature import config
    from secondnature.cli.connect import home_engine, home_model, interrupt
    from secondnature.cli.vllm import model_and_extras
    from secondnature.cli.vllm import serve as serve_vllm

    name, extras = model_and_extras(model, model_option, ctx.args)
    flags = {
        "model": name,
        "port": port,
        "host": host,
        "home": home,
        "device": device,
        "train_threads": train_threads,
        "share": share,
    }
    settings = config.load(flags)
    settings = settings.model_copy(update={"model": home_model(settings)})
    inside_vllm = (engine.value if engine else home_engine(settings)) == "vllm"
    if extras and not inside_vllm:
        kind = "No such option:" if extras[0].startswith("-") else "Got unexpected extra argument"
        ctx.fail(f"{kind} {extras[0]} (vLLM's own options need --engine vllm)")
    os.umask(0o077)
    if inside_vllm:
        serve_vllm(settings, extras)
    from secondnature.serve.local import main as serve_local

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        return serve_local(settings)
    except KeyboardInterrupt:  # the usual way to stop a server: lessons on trial were undone in order
        return 0


@app.command()
@command
def chat(home: HomeOption = None, url: UrlOption = None, model: ModelOption = None) -> int:
    """Talk to the model; /no WHAT I WANTED records a correction."""
    from secondnature.cli.chat import chat as run
    from secondnature.cli.connect import Where
    from secondnature.cli.output import Output

    return run(Where(home, url, model), Output())


@app.command()
@command
def learn(
    corrections: Annotated[
        Path | None, typer.Argument(metavar="[CORRECTIONS]", help="JSONL, or a folder. Default: the ledger.")
    ] = None,
    probes: ProbesOption = None,
    development: Annotated[
        Path | None, typer.Option("--development", help="JSONL of probes to look at while training.")
    ] = None,
    replay: Annotated[Path | None, typer.Option("--replay", help="JSONL of answers not to forget.")] = None,
    replay_prompts: Annotated[
        Path | None, typer.Option("--replay-prompts", help="Prompts whose answers shall stay as they are.")
    ] = None,
    behaviour: Annotated[str | None, typer.Option("--behaviour", help="Which probes must improve.")] = None,
    objective: Annotated[
        Objective | None, typer.Option("--objective", help="sdft: learn from what was said about the answer.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Steps at most.")] = None,
    until_margin: Annotated[
        float | None, typer.Option("--until-margin", help="Stop at this margin, nats.")
    ] = None,
    until_passed: Annotated[
        float | None, typer.Option("--until-passed", help="Stop when this share of --development passes.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Learning rate. Default: the model card's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Examples per step.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of batches and rounding.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Find the learning rate by short trial runs.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep it unjudged: no probes.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be taught, token for token.")
    ] = False,
    guards: Annotated[
        str | None,
        typer.Option(
            "--guards",
            metavar="PACKS",
            help="Of facts,arithmetic,instructions,code,refusal; or none.",
        ),
    ] = None,
    report: Annotated[Path, typer.Option("--report", help="Where the report goes.")] = Path("report.html"),
    home: HomeOption = None,
    url: UrlOption = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> int:
    """Teach corrections: measure, train, measure, keep or undo."""
    from secondnature.cli.connect import Where
    from secondnature.cli.learn import learn as run
    from secondnature.cli.output import Output
    from secondnature.cli.sources import LearnFlags, parse_guards

    flags = LearnFlags(
        probes,
        development,
        replay,
        replay_prompts,
        behaviour,
        objective.value if objective else None,
        max_steps,
        until_margin,
        until_passed,
        lr,
        batch_size,
        seed,
        keep,
        dry_run,
        parse_guards(guards),
    )
    out = Output(as_json=as_json)
    return run(corrections, flags, Where(home, url, model), report, out, calibrate=calibrate)


@app.command()
@command
def lint(
    corrections: Annotated[Path, typer.Argument(metavar="CORRECTIONS", help="JSONL, or a lesson's folder.")],
    probes: ProbesOption = None,
    as_json: JsonOption = False,
) -> int:
    """Say what may be wrong with corrections and probes, by reading them; 1 where something is."""
    from secondnature.cli.lint import lint as run
    from secondnature.cli.output import Output

    return run(corrections, probes, Output(as_json=as_json))


@app.command("import")
@command
def import_(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILES", help="Data sets, exports, logs; archives and folders too."),
    ],
    form: Annotated[
        str | None, typer.Option("--format", help="The shape, where it is not to be found.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--map", help="Of a table: answer=rejected,correction=chosen.")
    ] = None,
    turns: Annotated[Turns, typer.Option("--turns", help="Which answers of a conversation.")] = Turns.all,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="A JSONL of corrections, instead of the ledger.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that cannot be taken.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> int:
    """Add people's files of any known shape to the ledger, after showing what they hold."""
    from secondnature.cli.connect import Where
    from secondnature.cli.importing import Chosen, import_files, parse_map
    from secondnature.cli.output import Output
    from secondnature.importers import Options

    options = Options(turns.value, parse_map(columns))
    chosen = Chosen(options, form, yes, skip_bad, out_file)
    return import_files(files, chosen, Where(home, url), Output(as_json=as_json))


@app.command()
@command
def review(
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="ID", help="Teach this candidate; `all`: every one.")
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option("--drop", metavar="ID", help="Take this candidate out; `all`: every one."),
    ] = None,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> int:
    """Keep, drop or edit the candidates that an import found; none is taught before."""
    from secondnature.cli.connect import Where
    from secondnature.cli.output import Output
    from secondnature.cli.review import review as run

    return run(keep or [], drop or [], Where(home, url), Output(as_json=as_json))


@app.command()
@command
def train(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON: a body of POST /v1/train.")],
    report: Annotated[Path | None, typer.Option("--report", help="Write a report there.")] = None,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> int:
    """Send a training request as it is, and follow it."""
    from secondnature.cli.connect import Where
    from secondnature.cli.learn import check_report_path
    from secondnature.cli.lessons import train as run
    from secondnature.cli.output import Output

    if report is not None:
        check_report_path(report)
    return run(file, Where(home, url), report, Output(as_json=as_json))


@app.command()
@command
def checkpoint(home: HomeOption = None, url: UrlOption = None, as_json: JsonOption = False) -> int:
    """Write the weights, as they are, into the home's working copy."""
    from secondnature.cli import lessons
    from secondnature.cli.connect import Where
    from secondnature.cli.output import Output

    return lessons.checkpoint(Where(home, url), Output(as_json=as_json))


@app.command()
@command
def doctor(
    probes: ProbesOption = None,
    no_write: Annotated[
        bool, typer.Option("--no-write", help="Teach nothing: leave `write and restore` out.")
    ] = False,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check this machine, the home and the server; with --probes, how often answers flip by themselves."""
    from secondnature.cli.connect import Where
    from secondnature.cli.doctor import doctor as run
    from secondnature.cli.output import Output

    return run(probes, Where(home, url), Output(as_json=as_json), write=not no_write)


@app.command()
@command
def fsck(home: HomeOption = None, as_json: JsonOption = False) -> int:
    """Read everything in a home that no server holds, and say what is damaged; repairs nothing."""
    from secondnature.cli.fsck import fsck as run
    from secondnature.cli.output import Output

    return run(home, Output(as_json=as_json))
