"""``eomt-convert make-delta``."""

from pathlib import Path
from typing import get_args

import click

from converter.catalog import Task
from converter.cli.publish import licence_option, private_option
from converter.cli.session import (
    SOURCE,
    Session,
    common_options,
    hub_options,
    progress_bar,
)
from converter.errors import UsageError
from converter.weights.merge import WeightsFormat


@click.command("make-delta")
@click.argument("model", metavar="MODEL|REPO[@REV]")
@click.option(
    "--backbone",
    metavar=SOURCE,
    required=True,
    help="The backbone that the model was trained from, in any layout.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Folder for the delta."
)
@click.option(
    "--format",
    type=click.Choice(get_args(WeightsFormat)),
    default="torch",
    show_default=True,
    help="pytorch_model.bin, which the original's loader reads, or model.safetensors.",
)
@click.option("--push-to", metavar="REPO", help="Publish the delta as this repository.")
@private_option
@licence_option
@click.option(
    "--state-key",
    metavar="KEY",
    help="Which copy of the weights in MODEL to use, such as ema.",
)
@click.option(
    "--backbone-config",
    type=click.Path(path_type=Path),
    help="The backbone's config.json, in transformers' format. [default: beside it]",
)
@click.option("--task", type=click.Choice(get_args(Task)), help="If nothing in MODEL shows it.")
@click.option("--no-verify", is_flag=True, help="Do not run the model that the delta gives.")
@click.option(
    "--allow-mismatch", is_flag=True, help="Also if the model was not trained from the backbone."
)
@click.option("--force", is_flag=True, help="Replace a delta that exists.")
@hub_options
@common_options
def make_delta_command(
    model: str,
    backbone: str,
    output: Path,
    format: WeightsFormat,
    push_to: str | None,
    private: bool | None,
    license_file: Path | None,
    state_key: str | None,
    backbone_config: Path | None,
    task: Task | None,
    no_verify: bool,
    allow_mismatch: bool,
    force: bool,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Make the delta of MODEL to its backbone, as TU/e publishes it, and add it up again.

    MODEL is a converted or fine-tuned folder, a repository, or a file of absolute weights.

    Exit codes: 0 done, 1 failed, 3 the delta does not give the model.
    """
    session = Session(as_json=as_json, debug=debug, token=token)
    with session.errors():
        from converter import report
        from converter.deltas import make_delta
        from converter.hub.access import Access
        from converter.publishing.push import check_login, publish

        access = Access.of(token, cache_dir, offline)
        if push_to:
            check_login([push_to], access.online)
        elif private is not None or license_file:
            option = "--license-file" if license_file else "--private or --public"
            raise UsageError(f"{option} needs --push-to.")
        with progress_bar(session.shows_progress) as progress:
            done = make_delta(
                model,
                backbone,
                output,
                format=format,
                state_key=state_key,
                backbone_config=backbone_config,
                task=task,
                verify=not no_verify,
                allow_mismatch=allow_mismatch,
                force=force,
                token=token,
                cache_dir=cache_dir,
                local_files_only=offline,
                progress=progress,
            )
        session.say(*report.flagged(done.pair))
        lines, content = report.delta(done, output), done.to_dict()
        if not push_to:
            session.show(lines, content)
            return
        if not as_json:  # shown before the push, which may fail
            session.show(lines, {}, f"The delta is {output}; it was not pushed.")
        published = publish(
            done.output,
            push_to,
            private=private,
            license_file=license_file,
            allow_unverified=no_verify,
            access=access,
        )
        session.show(
            report.publication(published),
            {**content, "published": published.to_dict()},
            report.pushed(published),
        )
