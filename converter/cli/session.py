"""What every command shares: its options, how it prints, and how it ends."""

import errno
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO

import click

from converter.errors import EomtConvertError, OutputsDifferError
from converter.hub.access import check_endpoint, without_secrets
from converter.outside import json_text, visible

if TYPE_CHECKING:
    from converter.job import Progress

# as shells report what SIGPIPE has ended: 128 + its number
CLOSED = 141

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
    """How a command prints, and how it ends.

    All that is printed passes here, and only here: what comes from outside is made visible, line
    by line, and tokens and passwords are left out.
    """

    def __init__(
        self, *, as_json: bool = False, debug: bool = False, token: str | None = None
    ) -> None:
        self.as_json = as_json
        self.debug = debug
        self.token = token

    def show(self, lines: Iterable[str], content: dict[str, Any], done: str = "") -> None:
        """Prints a result: its lines, or with --json its one JSON object.

        Args:
            lines: of text; a line break in one of them is from outside.
            content: what --json shows.
            done: what was done that cannot be undone, to be told also where standard output is
                closed or full.
        """
        try:
            if self.as_json:
                _write(sys.stdout, self._json(content))
            else:
                self._write_lines(sys.stdout, lines)
        except OSError as error:
            if done:
                self.say(done)
            self.output_failed(error)

    def fail(self, error: EomtConvertError) -> NoReturn:
        """Ends the command with what happened and what to do about it."""
        if self.debug:
            self.say(*"".join(traceback.format_exception(error)).split("\n"))
        # our own lists are indented; another line break in a message is from outside
        message = re.split(r"\n(?=  )", f"Error: {error.message}")
        self.say(*message, *filter(None, error.remedy.split("\n")))
        content: dict[str, Any] = {
            "error": {
                "message": error.message,
                "remedy": error.remedy,
                "exit_code": error.exit_code,
            }
        }
        if isinstance(error, OutputsDifferError):
            from converter import report

            self.say(*report.verdict(error.verdict))
            content |= (error.conversion or error.verdict).to_dict()
        if self.as_json:
            self.show((), content)
        sys.exit(error.exit_code)

    def say(self, *lines: str) -> None:
        """Prints what is not the result, such as a warning; not where nobody can read it."""
        try:
            self._write_lines(sys.stderr, lines)
        except OSError:
            _discard(sys.stderr)

    def output_failed(self, error: OSError) -> NoReturn:
        """Ends a command whose standard output is closed or full, as other tools end."""
        _discard(sys.stdout)
        if isinstance(error, BrokenPipeError):
            sys.exit(CLOSED)
        self.say(f"Error: Standard output cannot be written to: {error.strerror}.")
        sys.exit(EomtConvertError.exit_code)

    def _write_lines(self, stream: TextIO | None, lines: Iterable[str]) -> None:
        shown = [self._shown(line) for line in lines]
        if shown:
            _write(stream, "\n".join(shown))

    def _json(self, content: dict[str, Any]) -> str:
        content = self._clean(content)
        text = json_text(content)
        return text if _encoded(sys.stdout, text) == text else json_text(content, only_ascii=True)

    def _clean(self, value: Any) -> Any:
        """The same for JSON, without tokens and passwords."""
        match value:
            case str():
                return self._without_secrets(value)
            case dict():
                return {self._clean(key): self._clean(entry) for key, entry in value.items()}
            case list() | tuple():
                return [self._clean(entry) for entry in value]
        return value

    @property
    def shows_progress(self) -> bool:
        """Whether somebody watches: standard error is a terminal, and --json was not given."""
        return sys.stderr is not None and sys.stderr.isatty() and not self.as_json

    @contextmanager
    def _quiet_client(self) -> Iterator[None]:
        """Keeps the progress bars of huggingface_hub, read when it is imported, to terminals."""
        name = "HF_HUB_DISABLE_PROGRESS_BARS"
        if name in os.environ or self.shows_progress:
            yield
            return
        os.environ[name] = "1"
        try:
            yield
        finally:
            del os.environ[name]

    @contextmanager
    def _logs(self) -> Iterator[None]:
        """Has what libraries log in this block shown as all the rest."""
        session, before = self, logging.getLogRecordFactory()

        class Record(logging.LogRecord):
            def getMessage(self) -> str:  # noqa: N802  # its name in logging
                return "\n".join(map(session._shown, super().getMessage().split("\n")))

        logging.setLogRecordFactory(Record)
        try:
            yield
        finally:
            logging.setLogRecordFactory(before)

    def _shown(self, line: str) -> str:
        return visible(self._without_secrets(line))

    def _without_secrets(self, text: str) -> str:
        return without_secrets(text, self.token)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns errors that a user can meet into messages and exit codes."""
        try:
            with self._quiet_client(), self._logs(), _stopped_by_signals():
                check_endpoint()
                yield
        except EomtConvertError as error:
            self.fail(error)
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, _StopError) else signal.SIGINT
            self.say("Interrupted; nothing unfinished was left behind.")
            sys.exit(128 + number)  # as shells report it
        except OSError as error:
            # a folder on the way that may not be looked into, a name too long, a broken disk: any
            # look at a path that was given can end so
            if error.filename is None:
                self._fault(error)
            path = os.fsdecode(error.filename)
            unusable = EomtConvertError(f"{path} cannot be used: {error.strerror}.")
            unusable.__cause__ = error  # for --debug
            self.fail(unusable)
        except Exception as error:
            if not _is_lack_of_memory(error):
                self._fault(error)
            lacking = EomtConvertError(
                "The memory of this machine or of its GPU does not suffice.",
                "A smaller batch needs less, and so does a smaller image size.",
            )
            lacking.__cause__ = error
            self.fail(lacking)

    def _fault(self, error: Exception) -> NoReturn:
        self.say(*"".join(traceback.format_exception(error)).split("\n"))
        self.say("This is a fault in eomt-convert. Please report it with the lines above.")
        sys.exit(EomtConvertError.exit_code)


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether Python, torch on a GPU or torch on the CPU could not allocate memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which need not be loaded
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _write(stream: TextIO | None, text: str) -> None:
    """Prints a text.

    Raises:
        OSError: the stream is closed or full.
    """
    if stream is None:  # which was closed before the command began
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    click.echo(_encoded(stream, text), file=stream)


def _encoded(stream: TextIO | None, text: str) -> str:
    """A text, with what the stream's encoding lacks made visible."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _discard(stream: TextIO | None) -> None:
    """Keeps Python from writing what is left to a stream that cannot take it when it ends."""
    if stream is not None:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Commands(click.Group):
    """Commands of which help and wrong usage, which click prints, are printed as all the rest."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with self._edge():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with self._edge():
            return super().invoke(ctx)

    @contextmanager
    def _edge(self) -> Iterator[None]:
        try:
            yield
        except click.ClickException as error:
            text = io.StringIO()
            error.show(text)
            Session().say(*text.getvalue().rstrip("\n").split("\n"))
            sys.exit(error.exit_code)
        except OSError as error:
            Session().output_failed(error)


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
) -> "Iterator[Progress]":
    """Shows how far every stage is, if it is shown; takes its name, what is done and the total."""
    if not shown:
        yield lambda *_: None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.DownloadColumn() if of == "bytes" else rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield advance
