"""``eomt-convert evaluate``."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.session import (
    CompilingCommand,
    Session,
    common_options,
    compile_option,
    hub_options,
    progress_bar,
    threads_option,
)
from converter.models import Compile

if TYPE_CHECKING:
    from converter.pictures.evaluation import Evaluation


@click.command("evaluate", cls=CompilingCommand)
@click.argument("model", metavar="MODEL|REPO[@REV]")
@click.option(
    "--dataset",
    required=True,
    metavar="NAME",
    help="coco-panoptic, coco-instance or ade20k-semantic.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder that holds the dataset's zips, or their unpacked content.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use only this many pictures.")
@click.option("--device", help="As torch names it. [default: a GPU if there is one]")
@compile_option
@threads_option
@hub_options
@common_options
def evaluate_command(
    model: str,
    dataset: str,
    data: Path,
    limit: int | None,
    device: str | None,
    compile: Compile | None,
    threads: int | None,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Measure a converted model on a dataset: PQ, mask AP or mIoU.

    Under torchrun the pictures are split over its processes:
    torchrun --nproc-per-node 8 --no-python eomt-convert evaluate ...
    """
    from converter.pictures.evaluation import evaluate, is_first_process

    first = is_first_process()
    session = Session(as_json=as_json and first, debug=debug, token=token)
    with session.errors():
        if threads:
            import torch

            torch.set_num_threads(threads)
        with progress_bar(session.shows_progress and first, of="pictures") as progress:
            found = evaluate(
                model,
                dataset,
                data,
                limit=limit,
                device=device,
                compile=compile,
                token=token,
                cache_dir=cache_dir,
                local_files_only=offline,
                progress=progress,
            )
        if first:
            session.show(_table(found), found.to_dict())


def _table(found: "Evaluation") -> list[str]:
    """The figures with the published one beside them, then a line per class."""
    from converter.report import aligned

    summary = [("", "measured", "published", "difference")]
    for name, value in found.metrics.items():
        row = (name, _number(value), "-", "-")
        if found.published and name == found.published.metric:
            published, difference = found.published.value, found.published.difference
            row = (name, _number(value), f"{published:.1f}", f"{difference:+.2f}")
        summary.append(row)
    names = list(found.per_class[0])
    classes = [names, *([_number(row[name]) for name in names] for row in found.per_class)]
    lines = [f"{found.model} on {found.dataset}: {found.images} pictures", ""]
    lines += [*aligned(summary, numbers=True), "", f"means over {found.means_over}", ""]
    lines += aligned(classes, numbers=True)
    if found.published:
        lines += ["", f"published: {found.published.checkpoint} on {found.published.dataset}"]
    return lines


def _number(value: Any) -> str:
    """A figure with two decimals, a count or a name unchanged, or - for the mean of no values."""
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.2f}"
