"""``lm-calib export | pack | unpack``: folders that leave this program, and come back."""

from __future__ import annotations

import shlex
import sys

import typer

from lm_calib_plugin.cli_arguments import MODEL, WithRecipe, given_fields
from lm_calib_plugin.errors import UserError


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("export", cls=WithRecipe)(export_folder)
    app.command("pack")(pack)
    app.command("unpack")(unpack)


def export_folder(
    ctx: typer.Context,
    out: str = typer.Argument(metavar="OUT", help="The folder to make."),
    pretrained: str = typer.Option(..., *MODEL, help="Hub name, folder, or builtin:smollm2-135m."),
    format: str = typer.Option(
        "auto", "--format", "--export-format", help="dense, compressed-tensors, gptq, or auto."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an exported folder."),
    check: bool = typer.Option(True, help="Load the folder back and compare it with the model."),
    keep_calibration: bool = typer.Option(
        False, "--keep-calibration", help="Put the calibration set into the folder."
    ),
    max_shard_size: str = typer.Option("5GB", help="Largest size of a weights file."),
    results: str = typer.Option(None, metavar="FILE", help="lm_eval results for the model card."),
    dense_results: str = typer.Option(None, metavar="FILE", help="Those of the base model."),
    license: str = typer.Option(None, help="Of the base model. Default: what its card says."),
    tokenizer: str = typer.Option(None, help="Another tokenizer than that of the model."),
    revision: str = typer.Option("main", help="Branch, tag or commit of the model."),
    subfolder: str = typer.Option("", help="Folder of the model inside that name."),
    dtype: str = typer.Option("auto", help="Of the model."),
    device: str = typer.Option(None, help="Of the model."),
    calib_batch_size: str = typer.Option("auto", help="Sequences per forward pass."),
    cache: str = typer.Option("false", help="true or a folder: keep the weights for later runs."),
    report_dir: str = typer.Option(None, help="Folder of the per-layer report."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code"),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Compress a model and keep it as an ordinary Hugging Face folder."""
    from pathlib import Path

    from lm_calib_plugin.export.options import ExportOptions
    from lm_calib_plugin.recipe import read_arguments
    from lm_calib_plugin.runtime import Runtime

    recipe, _ = read_arguments(given_fields(ctx))
    options = ExportOptions(format, max_shard_size, overwrite, keep_calibration, check)
    runtime = Runtime(
        calib_batch_size=calib_batch_size, cache=cache, report_dir=report_dir, progress=not quiet
    )

    from lm_calib_plugin.export.command import export
    from lm_calib_plugin.loading import Loading

    loading = Loading(pretrained, tokenizer, revision, dtype, device, trust_remote_code, subfolder)
    try:
        done = export(
            recipe,
            loading,
            Path(out).expanduser(),
            options=options,
            runtime=runtime,
            results=Path(results).expanduser() if results else None,
            dense_results=Path(dense_results).expanduser() if dense_results else None,
            license=license,
            command=shlex.join(["lm-calib", *sys.argv[1:]]),
        )
    except UserError as error:
        raise _as_typed(error) from None
    if done:
        typer.echo(done)


def _as_typed(error: UserError) -> UserError:
    """Return an error about the format that names it as it is typed here."""
    if error.argument != "export_format":
        return error
    text = str(error.renamed("format"))
    return UserError("format", text.removeprefix("format: ").replace("export_format=", "--format "))


def pack(
    folder: str = typer.Argument(metavar="DIR", help="An exported folder of a pruned model."),
    archive: str = typer.Argument(metavar="ARCHIVE", help="The folder to make."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Store a pruned folder smaller, zeros as single bits: for disk and transfer, not for speed.

    Nothing loads an archive: lm-calib unpack gives the folder back, byte for byte.
    """
    from pathlib import Path

    from lm_calib_plugin.export.bitmask import pack_folder

    sizes = pack_folder(Path(folder).expanduser(), Path(archive).expanduser(), progress=not quiet)
    typer.echo(
        f"{archive}: {sizes.archive / 2**20:.1f} MiB, {sizes.archive / sizes.folder:.1%} of "
        f"{folder}; unpack it before use: lm-calib unpack {archive} OUT"
    )


def unpack(
    archive: str = typer.Argument(metavar="ARCHIVE", help="A folder made by lm-calib pack."),
    out: str = typer.Argument(metavar="OUT", help="The folder to make."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Give back the folder that was packed, byte for byte; nothing damaged gets a name."""
    from pathlib import Path

    from lm_calib_plugin.export.bitmask import unpack_folder

    record = unpack_folder(Path(archive).expanduser(), Path(out).expanduser(), progress=not quiet)
    typer.echo(f"{out}: {len(record.files) + 1} files, {record.bytes / 2**20:.1f} MiB, verified")
