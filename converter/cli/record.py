"""``eomt-convert record``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from converter.cli.convert import ImageSize
from converter.cli.session import Session, common_options, hub_options, threads_option

if TYPE_CHECKING:
    from converter.checks.recording import Recording


@click.command("record")
@click.argument("model", metavar="MODEL")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Folder for the recording."
)
@click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A picture as input; it becomes part of the recording. May be given several times.",
)
@click.option("--random", metavar="N", type=click.IntRange(1), help="N inputs of random pixels.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For --random.")
@click.option(
    "--layers",
    is_flag=True,
    help="Also record every layer's output for the first input, and every block's predictions with "
    "masked attention.",
)
@click.option(
    "--image-size",
    type=ImageSize(),
    help="Of the input; a smaller one makes a smaller recording. [default: the model's]",
)
@click.option("--force", is_flag=True, help="Replace a recording that exists.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@threads_option
@hub_options
@common_options
def record_command(
    model: str,
    output: Path,
    images: tuple[Path, ...],
    random: int | None,
    seed: int,
    layers: bool,
    image_size: tuple[int, int] | None,
    force: bool,
    device: str,
    threads: int | None,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Record what MODEL, a folder or a repository, computes, for later `verify --recorded`.

    The model is verified first. Exit codes: 0 recorded, 3 the model is wrong, 1 failed.
    """
    session = Session(as_json=as_json, debug=debug, token=token)
    with session.errors():
        from converter.checks.recording import record

        recording = record(
            model,
            output,
            images=images,
            random=random,
            seed=seed,
            layers=layers,
            image_size=image_size,
            force=force,
            device=device,
            threads=threads,
            token=token,
            cache_dir=cache_dir,
            local_files_only=offline,
        )
        session.show(_summary(recording, output), recording.to_dict())


def _summary(recording: "Recording", output: Path) -> list[str]:
    """What was recorded, where, and the verdict on the model."""
    from converter import report
    from converter.sizes import size_text

    width = max(map(len, recording.tensors))
    lines = [
        f"  {name:<{width}}  {dtype:<3}  {report.shape_text(shape)}"
        for name, (dtype, shape) in recording.tensors.items()
    ]
    title = f"recorded  {output} ({size_text(recording.size, 'MB')})"
    return [title, *lines, *report.verdict(recording.verdict)]
