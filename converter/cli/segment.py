"""``eomt-convert segment``."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from converter.catalog import Task
from converter.cli.session import (
    CompilingCommand,
    Session,
    common_options,
    compile_option,
    hub_options,
    progress_bar,
    threads_option,
)
from converter.configs import Dtype
from converter.errors import UnreadableFileError
from converter.models import Compile

if TYPE_CHECKING:
    from converter.pictures.segmenting import Overlay, Segmentation, SegmentedPicture


@click.command("segment", cls=CompilingCommand)
@click.argument("model", metavar="MODEL|REPO[@REV]")
@click.argument("pictures", metavar="PICTURE...", nargs=-1, required=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="segments",
    show_default=True,
    help="Folder to write to.",
)
@click.option(
    "--task",
    type=click.Choice(get_args(Task)),
    help="What to segment. [default: what the model was converted for]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Smallest score of a segment; not for semantic segmentation. [default: 0.8]",
)
@click.option(
    "--overlay",
    type=click.Choice(("jpg", "png", "none")),
    default="jpg",
    show_default=True,
    help="Format of the picture with coloured segments; none writes none.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Pictures that go through the network at once.",
)
@click.option("--device", help="As torch names it. [default: a GPU if there is one]")
@click.option(
    "--dtype",
    type=click.Choice(get_args(Dtype)),
    help="Of the weights. [default: as in the file]",
)
@compile_option
@threads_option
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Threads that read, draw and write beside the network; 0 for none. [default: by cores]",
)
@click.option("--force", is_flag=True, help="Replace files of an earlier run, and no others.")
@hub_options
@common_options
def segment_command(
    model: str,
    pictures: tuple[str, ...],
    output: Path,
    task: str | None,
    threshold: float | None,
    overlay: "Overlay",
    batch_size: int,
    device: str | None,
    dtype: str | None,
    compile: Compile | None,
    threads: int | None,
    workers: int | None,
    force: bool,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Segment pictures: files, folders or quoted patterns.

    For every picture an overlay with a legend, an id map and the segments as JSON (COCO's formats)
    are written. Pictures that cannot be read are reported and skipped; the exit code is then 1.
    """
    session = Session(as_json=as_json, debug=debug, token=token)
    with session.errors():
        from converter.pictures.segmenting import segment

        with progress_bar(session.shows_progress, of="pictures") as progress:
            found = segment(
                model,
                pictures,
                output,
                task=task,
                threshold=threshold,
                overlay=overlay,
                batch_size=batch_size,
                device=device,
                dtype=dtype or "auto",
                compile=compile,
                threads=threads,
                workers=workers,
                force=force,
                token=token,
                cache_dir=cache_dir,
                local_files_only=offline,
                progress=progress,
            )
        for entry in found.skipped:
            session.say(f"Skipped {entry.picture}: {entry.reason}")
        session.show(_lines(found), found.to_dict())
        if found.skipped:
            sys.exit(UnreadableFileError.exit_code)


def _lines(found: "Segmentation") -> list[str]:
    return [
        f"{entry.picture} -> {entry.overlay or entry.id_map}: {_counts(entry, found)}"
        for entry in found.pictures
    ]


def _counts(entry: "SegmentedPicture", found: "Segmentation") -> str:
    """The number of segments per class, such as "2 circle, sky"."""
    counts = Counter(segment.category_id for segment in entry.segments)
    words = [
        f"{number} {found.names[label]}" if number > 1 else found.names[label]
        for label, number in sorted(counts.items())
    ]
    return ", ".join(words) or "no segments"
