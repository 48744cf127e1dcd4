"""The ``lm-calib`` command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from typing import Any

import typer
from typer.core import TyperCommand

from lm_calib_plugin import cli_cache, cli_export, cli_inspect, cli_leaderboard
from lm_calib_plugin.cli_arguments import (
    MODEL,
    WithMethod,
    WithSet,
    flag_of,
    given_fields,
    named_texts,
    recipe_arguments,
)
from lm_calib_plugin.errors import CalibError, UserError

# Plain help texts: drawing boxes would triple the time that `--help` takes.
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


class _Verbatim(TyperCommand):
    """A command whose arguments belong to another program: nothing is read, dropped or moved."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return list(args)


class _Listed(str, Enum):
    methods = "methods"
    allocations = "allocations"
    scores = "scores"
    refinements = "refinements"
    updates = "updates"
    schemes = "schemes"
    transforms = "transforms"
    grids = "grids"
    roundings = "roundings"
    observers = "observers"
    sources = "sources"
    packings = "packings"
    selections = "selections"
    options = "options"


@app.callback()
def _root() -> None:
    """Prune or quantize a causal language model on load, with calibration data of your choice."""


@app.command("eval", cls=_Verbatim)
def evaluate(ctx: typer.Context) -> None:
    """Run lm_eval with our models known: the same command line, whatever starts Python."""
    from lm_calib_plugin import _autoload

    _autoload.register()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *ctx.args]
    cli_evaluate()


@app.command("calibrate", cls=WithSet)
def make_set(
    ctx: typer.Context,
    expression: str = typer.Argument(metavar="EXPR", help="Sources, such as self or c4*0.5+self."),
    pretrained: str = typer.Option(..., *MODEL, help="Hub name, folder, or builtin:smollm2-135m."),
    out: str = typer.Option(..., help="The folder to make."),
    purpose: str = typer.Option(
        None,
        "--for",
        metavar="KEY=VALUE,...",
        help="What a mixture is to serve, such as method=wanda,sparsity=0.5.",
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the set that is there."),
    tokenizer: str = typer.Option(None, help="Another tokenizer than that of the model."),
    revision: str = typer.Option("main", help="Branch, tag or commit of the model."),
    dtype: str = typer.Option("auto", help="Of the model, where it writes text itself."),
    device: str = typer.Option(None, help="Of the model, where it writes text itself."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code"),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Build a calibration set for a model and keep it in a folder: calibration=set:DIR."""
    from pathlib import Path

    from lm_calib_plugin.expression import NO_DATA
    from lm_calib_plugin.recipe import Recipe, check_purpose
    from lm_calib_plugin.runtime import Runtime

    if expression.strip().lower() == NO_DATA:
        raise UserError("calibration", "got none", "a source", "for instance self or file:my.jsonl")
    # Any method that uses data will do, unless a mixture is found for one.
    plain = {"method": "wanda", "sparsity": 0}
    method = plain if purpose is None else recipe_arguments([purpose])
    for name in Recipe.calibration_fields():
        if name in method:
            own = "EXPR" if name == "calibration" else flag_of(name)
            raise UserError(
                "for", f"got {name}={method[name]}", "the method to serve and its options", own
            )
    recipe = Recipe(**{**method, "calibration": expression, **given_fields(ctx)})
    check_purpose(recipe, purpose is not None)

    from lm_calib_plugin.calibrate import calibrate
    from lm_calib_plugin.loading import Loading

    loading = Loading(pretrained, tokenizer, revision, dtype, device, trust_remote_code)
    runtime = Runtime(progress=not quiet)
    typer.echo(
        calibrate(recipe, loading, Path(out).expanduser(), overwrite=overwrite, runtime=runtime)
    )


@app.command("preflight")
def judge_sets(
    recipe: list[str] = typer.Argument(  # noqa: B008 - how typer declares arguments
        metavar="KEY=VALUE,...", help="Method, nsamples, seqlen..."
    ),
    pretrained: str = typer.Option(..., *MODEL, help="Hub name, folder, or builtin:smollm2-135m."),
    sets: list[str] = typer.Option(  # noqa: B008
        ..., "--set", metavar="NAME=EXPR", help="A calibration set."
    ),
    domains: list[str] = typer.Option(  # noqa: B008
        ..., "--domain", metavar="NAME=EXPR", help="Text of a domain to be served."
    ),
    judged: int = typer.Option(None, min=1, help="Sequences of a domain to judge on."),
    bank: str = typer.Option(None, help="Folder of the statistics bank, kept for later."),
    out: str = typer.Option(None, help="Folder for the table, a JSON file and a plot."),
    tokenizer: str = typer.Option(None, help="Another tokenizer than that of the model."),
    revision: str = typer.Option("main", help="Branch, tag or commit of the model."),
    dtype: str = typer.Option("auto", help="Of the model."),
    device: str = typer.Option(None, help="Of the model."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code"),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Judge calibration sets on domains before an evaluation is paid for: a table, one advice."""
    from pathlib import Path

    from lm_calib_plugin.recipe import Recipe
    from lm_calib_plugin.runtime import Runtime

    asked = Recipe.from_model_args(recipe_arguments(recipe))
    named_sets, named_domains = named_texts("set", sets), named_texts("domain", domains)

    from lm_calib_plugin.loading import Loading
    from lm_calib_plugin.preflight import Question, preflight

    answer = preflight(
        Question(asked, named_sets, named_domains, judged),
        Loading(pretrained, tokenizer, revision, dtype, device, trust_remote_code),
        bank=Path(bank).expanduser() if bank else None,
        out=Path(out).expanduser() if out else None,
        runtime=Runtime(progress=not quiet),
    )
    typer.echo(answer.table())


class _WithFolds(WithSet):
    def fields(self) -> list[str]:
        return [name for name in super().fields() if name != "fold"]


@app.command("bank", cls=_WithFolds)
def make_bank(
    ctx: typer.Context,
    pretrained: str = typer.Option(..., *MODEL, help="Hub name, folder, or builtin:smollm2-135m."),
    out: str = typer.Option(..., help="Folder of the bank."),
    source: list[str] = typer.Option([], metavar="NAME=EXPR", help="Give one or more."),  # noqa: B008
    folds: str = typer.Option("choose,judge", help="Folds that every source is drawn from."),
    groups: int = typer.Option(1, help="Gram matrices a part; 16 for draws of gptq, sparsegpt."),
    second_order: bool = typer.Option(True, help="Keep Gram matrices, or input norms alone."),
    exclude_first_token: bool = typer.Option(False, "--exclude-first-token"),
    targets: str = typer.Option(None, help="Layers, name patterns joined by +."),
    ignore: str = typer.Option(None, help="Layers to leave out, name patterns joined by +."),
    block_path: str = typer.Option(None, help="Path of the list of decoder blocks."),
    tokenizer: str = typer.Option(None, help="Another tokenizer than that of the model."),
    revision: str = typer.Option("main", help="Branch, tag or commit of the model."),
    dtype: str = typer.Option("auto", help="Of the model."),
    device: str = typer.Option(None, help="Of the model."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code"),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Keep what the dense model sees of candidate sources, for draws and mixes without passes."""
    from pathlib import Path

    options: dict[str, Any] = given_fields(ctx)
    given = {"targets": targets, "ignore": ignore, "block_path": block_path}
    options |= {name: value for name, value in given.items() if value is not None}
    options["exclude_first_token"] = exclude_first_token

    from lm_calib_plugin.bank_commands import fill
    from lm_calib_plugin.loading import Loading
    from lm_calib_plugin.runtime import Runtime

    typer.echo(
        fill(
            named_texts("source", source),
            options,
            Loading(pretrained, tokenizer, revision, dtype, device, trust_remote_code),
            Path(out).expanduser(),
            folds=[fold.strip() for fold in folds.split(",") if fold.strip()],
            groups=groups,
            second_order=second_order,
            runtime=Runtime(progress=not quiet),
        )
    )


@app.command("draws", cls=WithMethod)
def compare_draws(
    ctx: typer.Context,
    bank: str = typer.Argument(metavar="BANK", help="Folder made by lm-calib bank."),
    pretrained: str = typer.Option(..., *MODEL, help="The model that the bank was built with."),
    method: str = typer.Option(..., help="A name of lm-calib ls methods."),
    source: str = typer.Option(..., help="Name of a source in the bank."),
    nsamples: int = typer.Option(..., help="Sequences of a draw."),
    draws: int = typer.Option(200, help="How many."),
    rows: int = typer.Option(16, help="Output rows looked at in each layer; 0: all."),
    domain: list[str] = typer.Option([], help="Sources to judge on. Default: all."),  # noqa: B008
    fold: str = typer.Option("choose", help="Fold that draws are taken from."),
    judge_fold: str = typer.Option("judge", help="Fold that domains are judged on."),
    seed: int = typer.Option(0, help="Of the resampling."),
    out: str = typer.Option(None, help="Folder for draws.json and draws.png."),
    revision: str = typer.Option("main", help="Branch, tag or commit of the model."),
    dtype: str = typer.Option("auto", help="Of the model."),
    device: str = typer.Option(None, help="Of the model."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code"),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Say how much another draw of the calibration set would change, without a forward pass."""
    from pathlib import Path

    from lm_calib_plugin.recipe import Recipe
    from lm_calib_plugin.runtime import Runtime

    options: dict[str, Any] = given_fields(ctx)
    recipe = Recipe(method=method, **options)

    from lm_calib_plugin.bank_commands import study_draws
    from lm_calib_plugin.loading import Loading

    typer.echo(
        study_draws(
            Path(bank).expanduser(),
            Loading(pretrained, None, revision, dtype, device, trust_remote_code),
            recipe,
            source,
            nsamples,
            domains=domain,
            fold=fold,
            judge_fold=judge_fold,
            draws=draws,
            rows=rows or None,
            seed=seed,
            out=Path(out).expanduser() if out else None,
            runtime=Runtime(progress=not quiet),
        )
    )


@app.command("ls")
def list_parts(what: _Listed) -> None:
    """List methods and what they are made of, calibration sources, or the options of a recipe."""
    from lm_calib_plugin.listing import print_list

    print_list(what.value)


@app.command()
def show(arguments: list[str]) -> None:
    """Check a recipe, given as KEY=VALUE,... or as a YAML file, and print it in full as YAML."""
    import yaml

    from lm_calib_plugin.recipe import Recipe

    given = recipe_arguments(arguments)
    metadata = Recipe.from_model_args(given).to_metadata()
    typer.echo(yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True), nl=False)


@app.command()
def doctor(
    folders: list[str] = typer.Argument(  # noqa: B008
        None, metavar="[FOLDER...]", help="Look for interrupted exports there, too."
    ),
    clean: bool = typer.Option(False, "--clean", help="Delete what interrupted writes left."),
) -> None:
    """Look at this installation: versions, the bridge to lm_eval, the cache, the devices."""
    from pathlib import Path

    from lm_calib_plugin.doctor import State, examine

    worst = 0
    for finding in examine(clean=clean, folders=[Path(f).expanduser() for f in folders or ()]):
        typer.echo(f"{finding.state.value:<8} {finding.what:<20} {finding.detail}")
        worst = max(worst, int(finding.state is State.PROBLEM))
    raise typer.Exit(worst)


cli_export.add_to(app)
cli_inspect.add_to(app)
cli_cache.add_to(app)
cli_leaderboard.add_to(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what the user can mend ends in one line and exit code 2."""
    try:
        app(None if arguments is None else list(arguments), prog_name="lm-calib")
    except CalibError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
