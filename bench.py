#!/usr/bin/env python3
"""Sparse ViT Bench: trains, evaluates, measures and ranks sparse vision transformers. `python bench.py --help`."""

# Imports of the harness stay inside the commands: torch and timm take seconds, and most mistakes can be told without.

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.cells import Run
    from harness.spec import Entry
    from harness.survey import Plan as SurveyPlan
    from harness.survey import TimeBudget
    from methods import Method

ROOT = Path(__file__).resolve().parent

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Trains, evaluates, measures and ranks sparse vision transformers. Without a command: runs a benchmark.",
)  # fmt: skip

Methods = Annotated[
    str | None, typer.Option("--methods", metavar="A,B", help="Only these methods (dense and dense+ are added).")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the spec (budget.epochs=2) or a setting (dynamicvit.keep_rate=[0.9,0.7]). Repeatable."),
]  # fmt: skip
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", metavar="FILE", help="A Python file with further methods. Repeatable.")
]
Stale = Annotated[
    str,
    typer.Option(
        metavar="keep|redo", help="What other code has made: keep it and mark it, or make it again. Records without a digest are left alone."
    ),
]  # fmt: skip
Results = Annotated[
    Path, typer.Option("--results", metavar="DIR", help="Where the records are.", show_default="results/")
]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    methods: Methods = None,
    spec: Annotated[
        str, typer.Option(metavar="FILE", help="The benchmark: a YAML file or a name in benchmarks/.")
    ] = "quick",
    set_: Sets = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds, instead of the spec's.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of training and measuring: auto, float32, bfloat16 or float16.")
    ] = None,
    data_root: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the images are, instead of the card's root.")
    ] = None,
    results: Results = ROOT / "results",
    plugin: Plugins = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make all records again.")] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try cells again that failed with an error or diverged.")
    ] = False,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure the latency of all cells again.")] = False,
    stale: Stale = "keep",
) -> None:
    """Runs a benchmark and writes the leaderboard."""
    if context.invoked_subcommand is not None:
        given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
        if given:
            option = "--" + given[0].strip("_").replace("_", "-")
            raise typer.BadParameter(f"write it after {context.invoked_subcommand}", param_hint=option)
        return
    from harness.cells import load_run
    from harness.data.cards import check_sum, find_root, load_card
    from harness.spec import find_spec

    redo = _redo(stale)
    overrides = [*(set_ or []), *([f"dtype={dtype}", f"measure.dtypes=[{dtype}]"] if dtype else [])]
    changes = {"device": device} if device else {}
    if seeds is not None:
        changes["seeds"] = _numbers(seeds)
    chosen = load_run(find_spec(spec), overrides, _names(methods), plugin or (), changes)
    # The data is looked at here already, and again by the harness, so that a wrong file is told before torch is imported.
    card, card_file = load_card(chosen.spec.data.card, chosen.folder)
    root = find_root(card, card_file, data_root)
    if card.reader == "npz":
        check_sum(card, root)
    raise typer.Exit(_execute(chosen, results, data_root, fresh=fresh, retry=retry, remeasure=remeasure, redo=redo))


def _execute(chosen: Run, results: Path, data_root: str | None, **again: bool) -> int:
    """Runs the cells, shows the tables, writes the leaderboard: 0, or 1 if a cell failed, or 130 after Ctrl-C."""
    from harness.progress import Reporter
    from harness.records import Store

    chosen.cells()  # wrong settings are told before torch is imported and data is read
    try:
        from harness import cluster
        from harness.data.dataset import open_data
        from harness.runner import Runner

        processes, device = cluster.join(chosen.spec.device)
        with Reporter(quiet=not processes.is_first) as reporter:
            reporter.say(f"data: {chosen.spec.data.card}")
            crop = chosen.spec.recipe.crop
            data = processes.in_turn(lambda: open_data(chosen.spec.data, chosen.folder, data_root, crop))
            if data.left_out:
                reporter.say(f"data: {data.left_out}")
            store = Store(results, chosen.name)
            failed = Runner(chosen, data, store, reporter, **again, cluster=processes, device=device).execute()
    except KeyboardInterrupt:
        again_note = " (without --fresh and --remeasure)" if again["fresh"] or again["remeasure"] else ""
        typer.echo(f"stopped; what was done is kept, and the same command{again_note} goes on with the rest")
        return 130
    if processes.is_first:
        _write_leaderboard(results, only=chosen.name, must_have=False)
    cluster.leave()
    return 1 if failed else 0


@app.command()
def leaderboard(
    results: Results = ROOT / "results",
    benchmark: Annotated[str | None, typer.Option(help="Show only this benchmark's tables (the file has all).")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers as CSV, too.")] = None,
) -> None:
    """Writes leaderboard.md from the records, and shows it."""
    from harness.errors import UserError

    if not results.is_dir():
        raise UserError(f"--results {results}: no such folder")
    _write_leaderboard(results, benchmark, csv)


@app.command("list")
def list_() -> None:
    """Methods, specs and data cards."""
    from rich.console import Console

    import methods
    from harness.overview import overview

    overview(Console(highlight=False), {name: methods.describe(name) for name in methods.available()})


@app.command()
def cost(
    backbone: Annotated[str, typer.Option(help="Any of timm's vision transformers.")] = "deit_small_patch16_224",
    methods: Methods = None,
    set_: Sets = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels, instead of the backbone's own.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Rows as JSON: per image, in units.")] = False,
    by: Annotated[str | None, typer.Option(metavar="part|block", help="Show where the MACs go, too.")] = None,
    also: Annotated[
        str | None,
        typer.Option(
            metavar="layernorm,softmax,gelu", help="Count these too (of what is executed only), as some scripts do."
        ),
    ] = None,
    authors: Annotated[
        bool, typer.Option("--authors", help="Also how a method's authors count, where that differs.")
    ] = False,
    counters: Annotated[
        bool, typer.Option("--counters", help="Also what common counters (torch's, fvcore's) say, and why they differ.")
    ] = False,
    images: Annotated[
        int, typer.Option(min=1, help="Random images over which costs that depend on the image are averaged.")
    ] = 2,
    plugin: Plugins = None,
) -> None:
    """MACs and parameters of methods on a backbone, without training."""
    if by not in (None, "part", "block"):
        raise typer.BadParameter(f"{by!r} must be part or block", param_hint="--by")
    entries, backbone_kwargs = _entries(methods, set_, plugin, backbone_keys=True)
    from harness.costs_shown import cost_rows, show_costs

    counted = [name.strip() for name in also.split(",")] if also else []
    rows, refused = cost_rows(backbone, backbone_kwargs, entries, image_size, counted, images, counters)
    show_costs(rows, as_json=json, by=by, authors=authors)
    for line in refused:
        typer.echo(line, err=True)
    raise typer.Exit(1 if refused else 0)


@app.command()
def latency(
    spec: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A survey: a YAML file or a name in benchmarks/. The options below change it."
        ),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Any of timm's vision transformers.", show_default="deit_small_patch16_224")
    ] = None,
    methods: Methods = None,
    set_: Sets = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels, instead of the backbone's own.")] = None,
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="1,8", help="Images per forward.", show_default="1,8")
    ] = None,
    dtypes: Annotated[str | None, typer.Option(metavar="A,B", help="float32, tf32, bfloat16, float16 or auto.")] = None,
    modes: Annotated[str | None, typer.Option(metavar="A,B", help="eager, compile, cudagraph.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Timed time per model and conditions, at least.", show_default="2")
    ] = None,
    keep_rate: Annotated[
        float | None,
        typer.Option(help="What methods are set to keep whose counts depend on the image.", show_default="0.7"),
    ] = None,
    energy: Annotated[bool, typer.Option("--energy", help="Joules per image, too (NVIDIA GPUs).")] = False,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Measure the device's limits, and show what share of them is reached.")
    ] = False,
    time_budget: Annotated[
        str | None, typer.Option(metavar="25m", help="Stop in time; the same command goes on later.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure again what has a record.")] = False,
    stale: Stale = "keep",
    results: Results = ROOT / "results",
    plugin: Plugins = None,
) -> None:
    """Latency of methods on a backbone, without training."""
    from harness.cells import take_digests
    from harness.spec import find_spec
    from harness.survey import Survey, TimeBudget, change, load_survey, only_backbone, plan, seconds_of

    redo = _redo(stale)
    budget = TimeBudget(seconds_of(time_budget) if time_budget else None)
    path = find_spec(spec) if spec else None
    survey = load_survey(path) if path else Survey(cases=[{"batch_sizes": [1, 8]}], seconds=2.0)
    entries, kwargs = _entries(methods, set_, plugin, backbone_keys=path is None, given=survey.entries)
    take_digests(entries)
    if path and backbone:
        survey = only_backbone(survey, backbone)
    conditions = {
        "image_size": image_size, "batch_sizes": _numbers(batch_sizes, "--batch-sizes") if batch_sizes else None,
        "dtypes": dtypes.split(",") if dtypes else None, "modes": modes.split(",") if modes else None,
    }  # fmt: skip
    if path is None:
        conditions["backbone"] = {"name": backbone or "deit_small_patch16_224", "kwargs": kwargs}
    others = {"seconds": seconds, "keep_rate": keep_rate, "device": device, "energy": energy or None}
    planned = plan(path.stem if path else "latency", change(survey, "the command line", conditions, others), entries)
    raise typer.Exit(_survey(planned, results, budget, roofline, remeasure, redo))


def _survey(planned: SurveyPlan, results: Path, budget: TimeBudget, roofline: bool, remeasure: bool, redo: bool) -> int:
    """Measures and shows: 0, or 1 if a row failed, or 130 after Ctrl-C."""
    from harness.progress import Reporter
    from harness.records import Store

    with Reporter() as reporter:
        try:
            from harness.surveyor import Surveyor

            surveyor = Surveyor(planned, Store(results, planned.name), reporter, budget, remeasure, redo)
            failed = surveyor.execute(roofline)
        except KeyboardInterrupt:
            reporter.done("stopped; what was measured is kept, and the same command goes on with the rest")
            return 130
        if surveyor.left:
            reporter.say(
                f"the time is up; {surveyor.left} measurements are left, and the same command goes on with them"
            )
    _write_leaderboard(results, only=planned.name, must_have=False)
    return 1 if failed else 0


@app.command()
def check(
    method: Annotated[str, typer.Argument(help="Its name.")],
    set_: Sets = None,
    plugin: Plugins = None,
    same_results: Annotated[
        bool,
        typer.Option(
            "--same-results",
            help="Instead: train a few steps with the code of a commit and with that of the working tree, with the defaults and the settings "
            "of all records of the method in results/, or only those of --set; where all is equal to the bit, methods/same_results.yaml says so "
            "from then on, and results of the one with these settings count as the other's.",
        ),
    ] = False,
    against: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="What --same-results compares with.", show_default="HEAD")
    ] = None,
    fingerprint_of: Annotated[str | None, typer.Option("--fingerprint-of", hidden=True)] = None,
) -> None:
    """Runs the conformance suite: does a method keep the contract?"""
    if against is not None and not same_results:
        raise typer.BadParameter("goes with --same-results", param_hint="--against")
    if fingerprint_of is not None:
        raise typer.Exit(_fingerprint(method, fingerprint_of))
    entries, _ = _entries(method, set_, plugin)
    from harness.cells import expand

    rows = [row for entry in entries for row in expand(entry)]
    if same_results:
        if len(entries) != 1:
            raise typer.BadParameter("name one method", param_hint="METHOD")
        raise typer.Exit(_compare(rows, against or "HEAD", with_records=not set_))
    from harness.conformance import check_method, show_findings

    passed = True
    for label, chosen in rows:
        passed &= show_findings(label, check_method(chosen))
    raise typer.Exit(0 if passed else 1)


def _compare(rows: list[tuple[str, Method]], against: str, with_records: bool) -> int:
    """Whether the working tree gives what a commit gave, with these settings of a method and those of its records: 0, or 1 if not."""
    from harness.code_comparison import compare_code, with_recorded

    name, left = rows[0][1].name, 0
    settings = {label: method.settings.model_dump(mode="json") for label, method in rows}
    if with_records:
        settings, left = with_recorded(name, settings, ROOT / "results")
    if left:
        typer.echo(f"{left} more settings in results/ are not compared; name them with --set")
    same, line = compare_code(name, settings, against)
    typer.echo(line)
    return 0 if same else 1


def _fingerprint(method: str, settings: str) -> int:
    """What the code gives with these settings (JSON, by label), in one line: --same-results asks for it in each of its two trees."""
    import json

    from harness.errors import UserError
    from harness.fingerprint import fingerprint

    try:
        typer.echo(json.dumps(fingerprint(method, json.loads(settings))))
    except ValueError as error:
        raise UserError(str(error)) from None
    return 0


@app.command()
def show(
    record: Annotated[str, typer.Argument(metavar="RECORD", help="A record's id (its beginning is enough) or file.")],
    results: Results = ROOT / "results",
) -> None:
    """Shows a record."""
    from harness import records
    from harness.overview import show_record

    show_record(records.load(records.find(results, record)))


@app.command()
def visualize(
    record: Annotated[
        str, typer.Argument(metavar="RECORD", help="A train record's id (its beginning is enough) or file.")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the pictures go.", show_default="results/pictures")
    ] = None,
    card: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="The data card, where it is not in datasets/.")
    ] = None,
    data_root: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the images are; kept patches are drawn over them.")
    ] = None,
    results: Results = ROOT / "results",
) -> None:
    """Draws what a trained model keeps (PNG): weights, heads, neurons, tokens, attention."""
    from harness import records
    from harness.errors import UserError
    from harness.pictures import draw
    from harness.tokenpictures import has_dropped

    content, photos = records.load(records.find(results, record)), None
    if "report" in content and has_dropped(content):
        from harness.photos import looked_at

        try:
            photos = looked_at(content, card, data_root)
        except UserError as error:
            typer.echo(f"kept patches are drawn without the images: {error}", err=True)
    for path in draw(content, output or results / "pictures", photos):
        typer.echo(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


@app.command()
def masks(
    record: Annotated[
        str, typer.Argument(metavar="RECORD", help="A train record's id (its beginning is enough) or file.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE.npy", help="Where the masks go.")],
    results: Results = ROOT / "results",
) -> None:
    """Writes a record's fixed attention masks as ViTCoD's authors do: bool [blocks, heads, queries, keys], True where pruned."""
    from harness import records
    from harness.pictures import write_masks

    write_masks(records.load(records.find(results, record)), output)
    typer.echo(output)


def _write_leaderboard(results: Path, only: str | None = None, csv: Path | None = None, must_have: bool = True) -> None:
    from rich.console import Console

    from harness import render
    from harness.errors import UserError
    from harness.leaderboard import tables
    from harness.surveyboard import surveys
    from methods.core.registry import unknown

    trained, timed = tables(results), surveys(results)
    target = (ROOT if results.resolve() == ROOT / "results" else results) / "leaderboard.md"
    render.write_markdown(trained, timed, target)
    if csv is not None:
        render.write_csv(trained, timed, csv)
    shown = [[table for table in found if only is None or table.benchmark == only] for found in (trained, timed)]
    if must_have and only is not None and not any(shown):
        raise UserError(unknown("benchmark", only, dict.fromkeys(table.benchmark for table in [*trained, *timed])))
    console = Console(highlight=False)
    render.show(shown[0], console if console.is_terminal else Console(highlight=False, width=160), shown[1])
    shown_path = target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target
    typer.echo(f"{shown_path}: {len(trained) + len(timed)} tables")


def _entries(
    methods: str | None,
    sets: list[str] | None,
    plugins: list[str] | None,
    backbone_keys: bool = False,
    given: Sequence[Entry] = (),
) -> tuple[list[Entry], dict]:
    """Entries of the named methods with METHOD.SETTING=VALUE applied, and backbone.KEY=VALUE. Where none is named: the given
    ones, or else all methods. A named method without a given entry gets its defaults."""
    from harness.cells import baseline_entries, known, parse_override, set_setting
    from harness.errors import UserError
    from harness.spec import Entry
    from methods import available, load_plugin

    try:
        added = [name for path in plugins or () for name in load_plugin(path)]
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    usual = [entry.method for entry in given] or [*(entry.method for entry in baseline_entries()), *available()]
    names = known(_names(methods) or [*usual, *added])
    entries, kwargs = [], {}
    for name in dict.fromkeys(names):
        entries += [entry for entry in given if entry.method == name] or [Entry(method=name)]
    for override in sets or ():
        key, value = parse_override(override)
        head, *rest = key.split(".")
        if backbone_keys and head == "backbone" and len(rest) == 1:
            kwargs[rest[0]] = value
        else:
            entries = set_setting(entries, head, rest, value, ["backbone"] if backbone_keys else [])
    return entries, kwargs


def _redo(stale: str) -> bool:
    if stale not in ("keep", "redo"):
        raise typer.BadParameter(f"{stale!r} must be keep or redo", param_hint="--stale")
    return stale == "redo"


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("needs at least one method", param_hint="--methods")
    return names


def _numbers(text: str, option: str = "--seeds") -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} must be whole numbers with commas between, e.g. 0,1,2", param_hint=option
        ) from None


def main() -> None:
    from harness.errors import UserError

    try:
        code = app(standalone_mode=False)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        code = 2
    except typer.Abort:
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # of the command line's own errors, wherever typer keeps their class
            raise
        typer.echo(f"error: {error.format_message()}  (--help shows what there is)", err=True)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
