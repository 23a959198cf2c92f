"""``eomt-convert export``."""

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from converter.cli.convert import ImageSize
from converter.cli.session import (
    Session,
    common_options,
    hub_options,
    progress_bar,
    report_option,
    threads_option,
)
from converter.history import ExportDtype, Format

if TYPE_CHECKING:
    from converter.exporting.export import Export


@click.command("export")
@click.argument("model", metavar="MODEL|REPO[@REV]")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Folder for the export."
)
@click.option(
    "--format",
    type=click.Choice(get_args(Format)),
    default="onnx",
    show_default=True,
    help="ONNX, or a program that torch.export.load reads.",
)
@click.option(
    "--image-size",
    type=ImageSize(),
    help="Fix the input's size. [default: all multiples of the patch size]",
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(ExportDtype)),
    default="float32",
    show_default=True,
    help="Of weights and computation; inputs and outputs are float32.",
)
@click.option("--layers", is_flag=True, help="Every layer's tokens are outputs, too.")
@click.option("--opset", type=int, help="Version of ONNX's operators. [default: 20]")
@click.option(
    "--recorded",
    type=click.Path(path_type=Path),
    help="Recorded outputs to compare with. [default: the model's; without any, the reference "
    "model's outputs for random pixels]",
)
@click.option("--no-verify", is_flag=True, help="Do not compare its outputs.")
@click.option(
    "--keep-unverified", is_flag=True, help="Keep an export that fails as OUTPUT.unverified."
)
@click.option("--force", is_flag=True, help="Replace an export that exists.")
@report_option
@threads_option
@hub_options
@common_options
def export_command(
    model: str,
    output: Path,
    format: Format,
    image_size: tuple[int, int] | None,
    dtype: ExportDtype,
    layers: bool,
    opset: int | None,
    recorded: Path | None,
    no_verify: bool,
    keep_unverified: bool,
    force: bool,
    report: Path | None,
    threads: int | None,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Export MODEL, a folder or a repository, to run elsewhere, and check what it computes.

    Exit codes: 0 exported, 3 the export computes something else, 1 failed.
    """
    session = Session(as_json=as_json, debug=debug, token=token)
    with session.errors():
        from converter.exporting.export import export

        with progress_bar(session.shows_progress, of="stages") as progress:
            done = export(
                model,
                output,
                format=format,
                image_size=image_size,
                dtype=dtype,
                layers=layers,
                opset=opset,
                recorded=recorded,
                verify=not no_verify,
                keep_unverified=keep_unverified,
                force=force,
                report=report,
                threads=threads,
                token=token,
                cache_dir=cache_dir,
                local_files_only=offline,
                progress=progress,
            )
        session.show(_summary(done, output), done.to_dict())


def _summary(done: "Export", output: Path) -> list[str]:
    """What was exported, where, and the verdict on it."""
    from converter import report
    from converter.sizes import size_text

    how = done.export
    size = (
        "x".join(map(str, how.image_size)) if how.image_size else "any multiple of the patch size"
    )
    opset = f", opset {how.opset}" if how.opset else ""
    return [
        f"exported  {output} ({size_text(sum(each.size for each in done.files.values()))})",
        f"format    {how.format}{opset}, {how.dtype}, input {how.input}: {size}",
        f"outputs   {', '.join(how.outputs[:2])}"
        + (f" and {len(how.outputs) - 2} of layers" if len(how.outputs) > 2 else ""),
        *report.verdict(done.verdict),
    ]
