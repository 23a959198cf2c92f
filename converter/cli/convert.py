"""``eomt-convert``: conversions, and the group of the other commands."""

from pathlib import Path
from typing import Any, get_args

import click

from converter.catalog import Task
from converter.cli.publish import push_options
from converter.cli.session import (
    SOURCE,
    Commands,
    Session,
    common_options,
    dtype_option,
    hub_options,
    progress_bar,
    report_option,
    shard_size_option,
)
from converter.errors import UsageError
from converter.job import Job, JobOptions
from converter.version import __version__
from converter.weights.inspection import WeightsKind
from converter.weights.layouts import BACKBONE_LAYOUTS

# \b keeps click from joining the lines that follow
HELP = """Convert EoMT-DINOv3 delta weights into a model that transformers loads, and check it.

\b
eomt-convert --checkpoint coco_panoptic_large_640
eomt-convert --checkpoint shapes_panoptic_128      (offline, from files in the package)

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the outputs differ from the recorded ones, 4 no
access or not found, 128 + N stopped by signal N, such as 130 by Ctrl+C.
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
@click.option("--delta", metavar=SOURCE, help="Delta weights to use instead of the catalogue's.")
@click.option(
    "--state-key",
    metavar="KEY",
    help="Which copy of the weights in --delta to convert, such as ema.",
)
@click.option("--backbone", metavar=SOURCE, help="Backbone to use instead of the catalogue's.")
@click.option(
    "--weights",
    type=click.Choice(["auto", *get_args(WeightsKind)]),
    default="auto",
    help="What --delta is; auto decides by the statistics of its layer norms.",
)
@click.option(
    "--backbone-layout",
    type=click.Choice(list(BACKBONE_LAYOUTS)),
    help="The backbone's layout. [default: recognised by its names]",
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
@click.option("--allow-mismatch", is_flag=True, help="Merge a pair that does not fit together.")
@click.option("--task", type=click.Choice(get_args(Task)))
@click.option("--image-size", type=ImageSize(), help="In pixels.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="Class names: one a line, a JSON list, or JSON categories with isthing.",
)
@click.option("--stuff", metavar="NAME,NAME", help="The classes that have no instances: sky,grass.")
@dtype_option
@shard_size_option
@click.option(
    "--recorded",
    type=click.Path(path_type=Path),
    help="Recorded outputs to check against: a folder, or its recorded.safetensors.",
)
@click.option("--verify/--no-verify", default=True, help="Whether to check the result.")
@click.option("--require-verified", is_flag=True, help="Fail unless the model is proven right.")
@click.option(
    "--keep-unverified", is_flag=True, help="Keep a model that fails, as OUTPUT.unverified."
)
@report_option
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
    require_verified: bool,
    keep_unverified: bool,
    report: Path | None,
    force: bool,
    dry_run: bool,
    push_to: str | None,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    as_json: bool,
    debug: bool,
    **options: Any,
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
                f"Options of {context.invoked_subcommand} go after its name.", context
            )
        return
    session = Session(as_json=as_json, debug=debug, token=token)
    with session.errors():
        job_options = {name: options.pop(name) for name in JobOptions.__annotations__}
        push = options  # what is left
        given = [name for name, value in push.items() if value not in (None, False)]
        if given and not push_to:
            raise UsageError(f"--{given[0].replace('_', '-')} needs --push-to.")
        job = Job.of(checkpoint, **job_options)

        from converter import report as texts
        from converter.conversion import plan_job, run_job
        from converter.destination import Destination
        from converter.hub.access import Access
        from converter.publishing.push import check_licence, check_login, publish

        destination = Destination.of(
            job,
            output,
            report=report,
            force=force,
            exist_ok=push_to is not None,
            keep_unverified=keep_unverified,
            require_verified=require_verified,
        )
        access = Access.of(token, cache_dir, offline)
        if dry_run:
            conversion = plan_job(job, access)
            session.say(*texts.warnings(conversion))
            session.show(texts.plan_table(conversion), conversion.to_dict())
            return
        if push_to:
            check_login([push_to], access.online)
            push["license_file"] = check_licence(job, push["license_file"], access)
        with progress_bar(session.shows_progress) as progress:
            conversion = run_job(job, destination, access, progress)
        session.say(*texts.warnings(conversion))
        place = str(output or f"./{destination.place.name}")
        content = conversion.to_dict()
        if not push_to:
            session.show(texts.summary(conversion, place), content)
            return
        if not as_json:  # shown before the push, which may fail
            session.show(
                texts.summary(conversion, place), {}, f"The model is {place}; it was not pushed."
            )
        published = publish(
            destination.place, push_to, recorded=job.recorded, access=access, **push
        )
        session.show(
            texts.publication(published),
            {**content, "published": published.to_dict()},
            texts.pushed(published),
        )
