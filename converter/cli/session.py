"""What every command shares: its options, how it prints, and how it ends."""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import click

from converter.errors import EomtConvertError, OutputsDifferError
from converter.hub.access import without_token

# what a run is asked to stop by, besides Ctrl+C; SIGHUP comes when a terminal is closed
_STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# said of every option that can name a file, a folder or a Hub repository
SOURCE = "PATH|REPO[@REV]"


class _StopError(KeyboardInterrupt):
    """A signal that asks a run to stop, which cleans up as it does after Ctrl+C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raises _StopError when a signal asks a run to stop; one that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread may set what signals do
        return

    def stop(number: int, _: FrameType | None) -> None:
        for each in before:  # closing a terminal may send several, and cleaning up takes a while
            signal.signal(each, signal.SIG_IGN)
        raise _StopError(number)

    # None: set by something other than Python
    left = (signal.SIG_IGN, None)
    before = {each: signal.getsignal(each) for each in _STOPPING}
    before = {each: handler for each, handler in before.items() if handler not in left}
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Session:
    """How a command prints, and how it ends."""

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

            self.say("\n".join(report.verdict(error.verdict)))
        if self.as_json:
            content: dict[str, Any] = {
                "error": {
                    "message": self._without_token(error.message),
                    "remedy": self._without_token(error.remedy),
                    "exit_code": error.exit_code,
                }
            }
            if isinstance(error, OutputsDifferError):
                content |= (error.conversion or error.verdict).to_dict()
            click.echo(json.dumps(content, indent=2, ensure_ascii=False))
        sys.exit(error.exit_code)

    def say(self, text: str) -> None:
        """Prints what is not the result, such as a warning."""
        click.echo(self._without_token(text), err=True)

    @contextmanager
    def _quiet_client(self) -> Iterator[None]:
        """Keeps the progress bars of huggingface_hub, read when it is imported, to terminals."""
        name = "HF_HUB_DISABLE_PROGRESS_BARS"
        if name in os.environ or (sys.stderr.isatty() and not self.as_json):
            yield
            return
        os.environ[name] = "1"
        try:
            yield
        finally:
            del os.environ[name]

    def _without_token(self, text: str) -> str:
        return without_token(text, self.token)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns errors that a user can meet into messages and exit codes."""
        try:
            with self._quiet_client(), _stopped_by_signals():
                yield
        except EomtConvertError as error:
            self.fail(error)
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, _StopError) else signal.SIGINT
            self.say("Interrupted; nothing unfinished was left behind.")
            sys.exit(128 + number)  # as shells report it
        except Exception as error:
            self.say("".join(traceback.format_exception(error)))
            self.say("This is a fault in eomt-convert. Please report it with the lines above.")
            sys.exit(EomtConvertError.exit_code)


token_option = click.option(
    "--token",
    metavar="TOKEN",
    help="Token for the Hub. HF_TOKEN or `hf auth login` keep it out of your shell's history and "
    "the list of processes.",
)

cache_option = click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    help="Where downloads are kept. [default: the Hub's cache]",
)

threads_option = click.option(
    "--threads", type=click.IntRange(1), help="Threads on the CPU. [default: torch's]"
)

offline_option = click.option(
    "--offline", is_flag=True, help="Use the cache alone, like HF_HUB_OFFLINE=1."
)


def hub_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that reads from the Hub."""
    return token_option(cache_option(offline_option(command)))


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command."""
    command = click.option("--debug", is_flag=True, help="Show where an error comes from.")(command)
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else."
    )(command)


@contextmanager
def progress_bar(
    shown: bool, *, of: Literal["bytes", "pictures"] = "bytes"
) -> Iterator[Callable[[str, int, int], None]]:
    """Shows how far every stage is, if it is shown; takes its name, what is done and the total."""
    if not shown:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    count = DownloadColumn() if of == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance
