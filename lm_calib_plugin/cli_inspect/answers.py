"""``lm-calib inspect answers``."""

from __future__ import annotations

import typer

from lm_calib_plugin.cli_inspect.options import Out


def inspect_answers(
    dense: str = typer.Argument(
        metavar="DENSE", help="Samples of the dense model: a file samples_*.jsonl, or a folder."
    ),
    compressed: str = typer.Argument(
        metavar="COMPRESSED", help="Those of the compressed model, of the same tasks."
    ),
    bins: int = typer.Option(15, min=1, help="Bins of confidence."),
    out: Out = None,
) -> None:
    """Say whether compression changed how sure a model is of answers that are right.

    Reads what lm_eval --log_samples --output_path DIR wrote of multiple-choice tasks: expected
    calibration error, Brier score and reliability diagrams of both models, item by item.
    """
    from pathlib import Path

    from lm_calib_plugin import __version__
    from lm_calib_plugin.diagnostics.answers import read_answers
    from lm_calib_plugin.diagnostics.answers_report import document
    from lm_calib_plugin.diagnostics.document import check_out

    folder = check_out(out)
    tasks = read_answers(Path(dense).expanduser(), Path(compressed).expanduser())
    found = document(dense, compressed, tasks, bins, __version__)
    typer.echo(found.text())
    if folder is not None:
        for path in found.write(folder, "answers"):
            typer.echo(f"wrote {path}", err=True)
