"""``eomt-convert`` itself: conversions, and the group that the other commands belong to."""

from pathlib import Path
from typing import Any, Literal

import click

from converter.catalog import Task, find
from converter.cli.publish import push_options
from converter.cli.session import (
    SOURCE,
    Commands,
    Session,
    common_options,
    hub_options,
    progress_bar,
)
from converter.configs import Dtype
from converter.errors import UsageError
from converter.job import choose_source
from converter.version import __version__
from converter.weights.inspection import WeightsKind

# \b keeps click from joining the lines that follow
HELP = """Convert EoMT-DINOv3 delta weights into a model that transformers loads, and check it.

\b
eomt-convert --checkpoint coco_panoptic_large_640
eomt-convert --checkpoint shapes_panoptic_128      (offline, from files in the package)

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the outputs are not what was recorded, 4 no access
or not there, 128 + N stopped by signal N, such as 130 by Ctrl+C.
"""


class ImageSize(click.ParamType[tuple[int, int]]):
    """``640`` or ``480x640``: pixels, height first."""

    name = "N|HxW"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is neither a number of pixels nor HEIGHTxWIDTH.", param, ctx)
        return int(parts[0]), int(parts[-1])


@click.group(
    cls=Commands,
    invoke_without_command=True,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--checkpoint", metavar="NAME", help="What to convert; `eomt-convert list` shows it.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder to write. [default: ./NAME]"
)
@click.option("--delta", metavar=SOURCE, help="Other delta weights than the catalogue's.")
@click.option("--backbone", metavar=SOURCE, help="Another DINOv3 backbone than the catalogue's.")
@click.option(
    "--weights",
    type=click.Choice(["auto", "delta", "absolute"]),
    default="auto",
    help="What --delta is; auto tells from the statistics of its layer norms.",
)
@click.option(
    "--backbone-layout",
    type=click.Choice(["transformers", "meta", "timm"]),
    help="The backbone's layout. [default: told from its names]",
)
@click.option(
    "--backbone-config",
    type=click.Path(path_type=Path),
    help="The backbone's config.json, in transformers' format.",
)
@click.option(
    "--check-backbone", is_flag=True, help="Run the backbone; compare with Meta's recorded outputs."
)
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    help="The picture for --check-backbone. [default: downloaded]",
)
@click.option("--allow-mismatch", is_flag=True, help="Merge a pair that does not belong together.")
@click.option("--task", type=click.Choice(["panoptic", "instance", "semantic"]))
@click.option("--image-size", type=ImageSize(), help="In pixels.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="Class names: one a line, a JSON list, or JSON categories with isthing.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    help="Type of the model's weights; sums are taken in float32 and rounded once.",
)
@click.option("--max-shard-size", metavar="SIZE", help="Largest file of weights, such as 2GB.")
@click.option(
    "--recorded",
    type=click.Path(path_type=Path),
    help="Recorded outputs to check against: a folder, or its recorded.safetensors.",
)
@click.option("--verify/--no-verify", default=True, help="Whether to check the result.")
@click.option("--require-verified", is_flag=True, help="Fail unless it is shown to be right.")
@click.option(
    "--keep-unverified", is_flag=True, help="Keep a model that fails, as OUTPUT.unverified."
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.html",
    help="Write what was found as a page to look at, too.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that are NaN or infinite.")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--dry-run", is_flag=True, help="Print the plan; read no weights.")
@click.option("--push-to", metavar="REPO", help="Publish the result as this model repository.")
@push_options
@hub_options
@common_options
@click.version_option(__version__, prog_name="eomt-convert")
@click.pass_context
def main(
    context: click.Context,
    /,
    checkpoint: str | None,
    output: Path | None,
    delta: str | None,
    backbone: str | None,
    weights: WeightsKind | Literal["auto"],
    backbone_layout: str | None,
    backbone_config: Path | None,
    check_backbone: bool,
    image: Path | None,
    allow_mismatch: bool,
    task: Task | None,
    image_size: tuple[int, int] | None,
    labels: Path | None,
    dtype: Dtype,
    max_shard_size: str | None,
    recorded: Path | None,
    verify: bool,
    require_verified: bool,
    keep_unverified: bool,
    report_file: Path | None,
    allow_nonfinite: bool,
    force: bool,
    dry_run: bool,
    push_to: str | None,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    as_json: bool,
    debug: bool,
    **push: Any,
) -> None:
    """Convert a checkpoint, unless another command was named."""
    if context.invoked_subcommand:
        given = [
            name
            for name in context.params
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        ]
        if given:
            raise click.UsageError(
                f"Options of {context.invoked_subcommand} stand behind its name.", context
            )
        return
    session = Session(as_json=as_json, debug=debug, token=token)
    with session.errors():
        if checkpoint is None and delta is None and backbone is None:
            raise UsageError(
                "There is nothing to convert: give --checkpoint NAME, or --delta and --backbone.",
                "eomt-convert list shows the checkpoints, eomt-convert --help the options.",
            )
        given = [name for name, value in push.items() if value not in (None, False)]
        if given and not push_to:
            raise UsageError(f"--{given[0].replace('_', '-')} is for --push-to.")
        from converter import report
        from converter.conversion import convert
        from converter.hub.access import Access
        from converter.publishing.push import check_licence, check_login, publish

        access = Access.of(token, cache_dir, offline)
        if push_to and not dry_run:
            check_login([push_to], access.online)
            entry = find(checkpoint) if checkpoint else None
            sources = {
                "delta": choose_source(delta, entry, "delta"),
                "backbone": choose_source(backbone, entry, "backbone")
                if backbone or entry
                else None,
            }
            push["license_file"] = check_licence(entry, sources, push["license_file"], access)
        with progress_bar(session.shows_progress) as progress:
            conversion = convert(
                checkpoint,
                output,
                delta=delta,
                backbone=backbone,
                weights=weights,
                backbone_layout=backbone_layout,
                backbone_config=backbone_config,
                check_backbone=check_backbone,
                image=image,
                allow_mismatch=allow_mismatch,
                task=task,
                image_size=image_size,
                labels=labels,
                dtype=dtype,
                max_shard_size=max_shard_size,
                recorded=recorded,
                verify=verify,
                require_verified=require_verified,
                keep_unverified=keep_unverified,
                report=report_file,
                allow_nonfinite=allow_nonfinite,
                force=force,
                exist_ok=push_to is not None,
                dry_run=dry_run,
                progress=progress,
                access=access,
            )
        if dry_run:
            session.show(report.plan_table(conversion.plan), conversion.to_dict())
            return
        session.say(*report.warnings(conversion.pair))
        place = str(output or f"./{conversion.output.name if conversion.output else ''}")
        content = conversion.to_dict()
        if not push_to or not conversion.output:
            session.show(report.summary(conversion, place), content)
            return
        if not as_json:  # also if the push fails
            session.show(
                report.summary(conversion, place), {}, f"The model is {place}; it was not pushed."
            )
        published = publish(
            conversion.output,
            push_to,
            recorded=recorded,
            access=access,
            **push,
        )
        session.show(
            report.publication(published),
            {**content, "published": published.to_dict()},
            report.pushed(published),
        )
