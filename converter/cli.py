"""The command line: parses, calls, prints."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import click

from converter.catalog import Task
from converter.errors import EomtConvertError, OutputsDifferError, UsageError
from converter.inspection import WeightsKind
from converter.job import Dtype
from converter.version import __version__

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# said of every option that can name a file, a folder or a Hub repository
SOURCE = "PATH|REPO[@REV]"


# \b keeps click from joining the lines that follow
HELP = """Convert EoMT-DINOv3 delta weights into a model that transformers loads, and check it.

\b
eomt-convert --checkpoint coco_panoptic_large_640
eomt-convert --checkpoint shapes_panoptic_128      (offline, from files in the package)

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the outputs are not what was recorded, 4 no access
or not there, 130 interrupted.
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


class Session:
    """What every command shares: how it prints, and how it ends."""

    def __init__(self, *, as_json: bool, debug: bool, token: str | None = None) -> None:
        self.as_json = as_json
        self.debug = debug
        self.token = token

    def show(self, text: str, content: dict[str, Any]) -> None:
        """Prints a result: its text, or with --json its one JSON object."""
        click.echo(json.dumps(content, indent=2, ensure_ascii=False) if self.as_json else text)

    def fail(self, error: EomtConvertError) -> NoReturn:
        """Ends the command with what happened and what to do about it."""
        if self.debug:
            self.say("".join(traceback.format_exception(error)))
        self.say(f"Error: {error}")
        if isinstance(error, OutputsDifferError):
            from converter import report

            self.say("\n".join(report.verdict(error.conversion.verdict)))
        if self.as_json:
            content: dict[str, Any] = {
                "error": {
                    "message": self._without_token(error.message),
                    "remedy": self._without_token(error.remedy),
                    "exit_code": error.exit_code,
                }
            }
            if isinstance(error, OutputsDifferError):
                content |= error.conversion.to_dict()
            click.echo(json.dumps(content, indent=2, ensure_ascii=False))
        sys.exit(error.exit_code)

    def say(self, text: str) -> None:
        """Prints what is not the result, such as a warning."""
        click.echo(self._without_token(text), err=True)

    def _without_token(self, text: str) -> str:
        for token in (self.token, os.environ.get("HF_TOKEN")):
            text = text.replace(token, "[token]") if token else text
        return text

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns errors that a user can meet into messages and exit codes."""
        try:
            yield
        except EomtConvertError as error:
            self.fail(error)
        except KeyboardInterrupt:
            self.say("Interrupted; nothing was left behind.")
            sys.exit(INTERRUPTED)


def hub_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that may reach the Hub."""
    for option in (
        click.option(
            "--token",
            metavar="TOKEN",
            help="Token for the Hub. HF_TOKEN or `hf auth login` keep it out of your shell's "
            "history and the list of processes.",
        ),
        click.option(
            "--cache-dir",
            type=click.Path(path_type=Path),
            help="Where downloads are kept. [default: the Hub's cache]",
        ),
        click.option("--offline", is_flag=True, help="Use the cache alone, like HF_HUB_OFFLINE=1."),
    ):
        command = option(command)
    return command


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command."""
    command = click.option("--debug", is_flag=True, help="Show where an error comes from.")(command)
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else."
    )(command)


@click.group(
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
@click.option("--require-verified", is_flag=True, help="Fail if there is nothing to check against.")
@click.option(
    "--keep-unverified", is_flag=True, help="Keep a model that fails, as OUTPUT.unverified."
)
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that are NaN or infinite.")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--dry-run", is_flag=True, help="Print the plan; read no weights.")
@hub_options
@common_options
@click.version_option(__version__, prog_name="eomt-convert")
@click.pass_context
def main(
    context: click.Context,
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
    allow_nonfinite: bool,
    force: bool,
    dry_run: bool,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    as_json: bool,
    debug: bool,
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
    signal.signal(signal.SIGTERM, _interrupt)
    with session.errors():
        if checkpoint is None and delta is None and backbone is None:
            raise UsageError(
                "There is nothing to convert: give --checkpoint NAME, or --delta and --backbone.",
                "eomt-convert list shows the checkpoints, eomt-convert --help the options.",
            )
        from converter import report
        from converter.conversion import convert

        with _progress_bar(sys.stderr.isatty() and not as_json) as progress:
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
                allow_nonfinite=allow_nonfinite,
                force=force,
                dry_run=dry_run,
                token=token,
                cache_dir=cache_dir,
                local_files_only=offline,
                progress=progress,
            )
        if dry_run:
            session.show(report.plan_table(conversion.plan), conversion.to_dict())
        else:
            for line in report.warnings(conversion.pair):
                session.say(line)
            place = str(output or f"./{conversion.output.name if conversion.output else ''}")
            session.show(report.summary(conversion, place), conversion.to_dict())


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Ends a run that is asked to stop as Ctrl+C does: cleaned up."""
    raise KeyboardInterrupt


@contextmanager
def _progress_bar(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    if not shown:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield advance


@main.command("list")
@common_options
def list_command(as_json: bool, debug: bool) -> None:
    """Show the catalogue: the checkpoints that have a name."""
    from converter import report
    from converter.catalog import CATALOG

    Session(as_json=as_json, debug=debug).show(
        report.catalogue_table(), {"checkpoints": [entry.to_dict() for entry in CATALOG]}
    )


@main.command("inspect")
@click.argument("source", metavar="PATH|REPO")
@hub_options
@common_options
def inspect_command(
    source: str,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Show what is in a file of weights: layout, tensors, and whether it is a delta."""
    session = Session(as_json=as_json, debug=debug, token=token)
    with session.errors():
        from converter import report
        from converter.inspection import inspect
        from converter.sources import Access, fetch, parse_source
        from converter.tensorfiles import open_tensors

        fetched = fetch(parse_source(source), Access(token, cache_dir, offline))
        with open_tensors(fetched.weights) as file:
            found = inspect(file)
        session.show(report.inspection(found), found.to_dict())


@main.command("verify")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--recorded",
    type=click.Path(path_type=Path),
    help="Recorded outputs: a folder, or its recorded.safetensors. [default: those that come with "
    "an offline checkpoint]",
)
@common_options
def verify_command(model: Path, recorded: Path | None, as_json: bool, debug: bool) -> None:
    """Check the model in a folder against recorded outputs and its own conversion.json.

    Exit codes: 0 passed or unverified, 3 failed, 1 unreadable.
    """
    session = Session(as_json=as_json, debug=debug)
    with session.errors():
        from converter import report
        from converter.verification import verify

        found = verify(model, recorded=recorded)
        session.show("\n".join(report.verdict(found)), found.to_dict())
        if found.verdict == "failed":
            sys.exit(OutputsDifferError.exit_code)
