"""``eomt-convert push`` and ``release``, and the options that ``--push-to`` shares with them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from converter.cli.session import (
    Session,
    cache_option,
    common_options,
    dtype_option,
    progress_bar,
    shard_size_option,
    token_option,
)
from converter.errors import EomtConvertError

private_option = click.option(
    "--private/--public",
    default=None,
    help="Who sees the repository. [default: private if new, else unchanged]",
)

licence_option = click.option(
    "--license-file",
    type=click.Path(path_type=Path),
    help="Text of DINOv3's licence. [default: from the backbone's repository]",
)


def push_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that publishes; their names are parameters of `publish`."""
    for option in reversed(
        (
            click.option("--revision", metavar="BRANCH", help="Branch to push to. [default: main]"),
            click.option("--create-pr", is_flag=True, help="Open a pull request instead."),
            click.option("--tag", metavar="TAG", help="Name for the commit, such as v1."),
            click.option("--commit-message", metavar="TEXT"),
            private_option,
            licence_option,
            click.option(
                "--allow-unverified",
                is_flag=True,
                help="Push a model that is not proven right; its card says so.",
            ),
            click.option(
                "--verify-remote",
                is_flag=True,
                help="Download the pushed model into a new folder and verify it.",
            ),
        )
    ):
        command = option(command)
    return command


@click.command("push")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo", metavar="REPO")
@push_options
@click.option(
    "--recorded",
    type=click.Path(path_type=Path),
    help="Recorded outputs for --verify-remote. [default: those of the offline checkpoints]",
)
@click.option("--dry-run", is_flag=True, help="Show what would change on the Hub; change nothing.")
@token_option
@cache_option
@common_options
def push_command(
    folder: Path,
    repo: str,
    dry_run: bool,
    token: str | None,
    cache_dir: Path | None,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Publish a converted FOLDER as the model repository REPO (owner/name), in one commit."""
    session = Session(as_json=as_json, debug=debug, token=token)
    with session.errors():
        from converter import report
        from converter.publishing.push import publish

        publication = publish(
            folder, repo, dry_run=dry_run, token=token, cache_dir=cache_dir, **options
        )
        session.show(
            report.publication(publication), publication.to_dict(), report.pushed(publication)
        )


@click.command("release")
@click.option(
    "--checkpoint",
    "checkpoints",
    metavar="NAME",
    multiple=True,
    help="What to release; may be given several times. [default: all published checkpoints]",
)
@click.option("--namespace", metavar="NAME", required=True, help="User or organisation.")
@click.option(
    "--name-template",
    default="eomt-dinov3-{slug}",
    show_default=True,
    help="Name of a repository; {name} is the checkpoint's own name.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="release",
    show_default=True,
    help="Folder for the models, release.json and release.md.",
)
@dtype_option
@shard_size_option
@push_options
@click.option("--force", is_flag=True, help="Start from scratch, whatever release.json says.")
@click.option("--dry-run", is_flag=True, help="Show what is left to do; do nothing.")
@token_option
@cache_option
@common_options
def release_command(
    checkpoints: tuple[str, ...],
    dry_run: bool,
    token: str | None,
    cache_dir: Path | None,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Convert, verify and publish the catalogue, or a part of it; a rerun continues.

    Exit codes: 0 all are published, 1 any failed.
    """
    session = Session(as_json=as_json, debug=debug, token=token)
    with session.errors():
        from converter import report
        from converter.publishing.release import release

        with progress_bar(session.shows_progress) as progress:
            released = release(
                checkpoints,
                dry_run=dry_run,
                token=token,
                cache_dir=cache_dir,
                progress=progress,
                announce=lambda text: session.say(*report.indented(text)),
                **options,
            )
        table = report.release_table(released)
        session.show(table, released.to_dict(), report.released(released))
        if released.failed and not dry_run:
            sys.exit(EomtConvertError.exit_code)
