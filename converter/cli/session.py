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
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO, get_args

import click

from converter.configs import Dtype
from converter.errors import EomtConvertError, OutputsDifferError
from converter.hub.access import check_endpoint, without_secrets
from converter.models import Compile
from converter.outside import json_text, visible

if TYPE_CHECKING:
    from converter.job import Progress

# 128 + the number of SIGPIPE, as shells report a command that it ended
CLOSED = 141

# signals that ask a run to stop, besides Ctrl+C; SIGHUP comes when a terminal is closed
_STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# the value of every option that can name a file, a folder or a Hub repository
SOURCE = "PATH|REPO[@REV]"


class _StopError(KeyboardInterrupt):
    """Raised when a signal asks a run to stop, so that it cleans up as after Ctrl+C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raises _StopError when a signal asks a run to stop; ignored signals (nohup) stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return

    def stop(number: int, _: FrameType | None) -> None:
        for each in before:  # more signals may arrive while the run cleans up
            signal.signal(each, signal.SIG_IGN)
        raise _StopError(number)

    def stop_again(unraisable: Any) -> None:
        """Sends the signal again, shortly after: Python drops what is raised in a finaliser."""
        error = unraisable.exc_value
        if not isinstance(error, _StopError):
            hook(unraisable)
            return
        signal.signal(error.number, stop)
        threading.Timer(0.01, os.kill, (os.getpid(), error.number)).start()

    # None: the handler was not set by Python
    left = (signal.SIG_IGN, None)
    before = {each: signal.getsignal(each) for each in _STOPPING}
    before = {each: handler for each, handler in before.items() if handler not in left}
    for each in before:
        signal.signal(each, stop)
    hook, sys.unraisablehook = sys.unraisablehook, stop_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for each, handler in before.items():
            signal.signal(each, handler)


class Session:
    """How a command prints, and how it ends.

    Everything that is printed passes through here: control characters in text from outside are made
    visible, and tokens and passwords are removed.
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
            lines: lines of text; a line break within one of them comes from outside.
            content: the JSON object that --json prints.
            done: what was done and cannot be undone; it is printed to standard error if standard
                output is closed or full.
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
        # our lists are indented; any other line break in a message comes from outside
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
        """Prints a message, such as a warning, to standard error, if that can be written to."""
        try:
            self._write_lines(sys.stderr, lines)
        except OSError:
            _discard(sys.stderr)

    def output_failed(self, error: OSError) -> NoReturn:
        """Ends a command whose standard output is closed or full, as other tools do."""
        _discard(sys.stdout)
        if isinstance(error, BrokenPipeError):
            sys.exit(CLOSED)
        self.say(f"Error: Standard output cannot be written: {error.strerror}.")
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
        """A JSON value without tokens and passwords."""
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
        """Whether to show progress: standard error is a terminal, and --json was not given."""
        return sys.stderr is not None and sys.stderr.isatty() and not self.as_json

    @contextmanager
    def _quiet_client(self) -> Iterator[None]:
        """Switches huggingface_hub's progress bars off unless progress is shown.

        It reads the variable when it is imported.
        """
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
        """Makes log messages of libraries in this block safe to print, like all other output."""
        session, before = self, logging.getLogRecordFactory()

        class VisibleRecord(logging.LogRecord):
            def getMessage(self) -> str:  # noqa: N802  # its name in logging
                return "\n".join(map(session._shown, super().getMessage().split("\n")))

        logging.setLogRecordFactory(VisibleRecord)
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
            # any access to a given path can fail: no permission for a folder, a name that is too
            # long, a broken disk
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
                "This machine or its GPU does not have enough memory.",
                "Use a smaller batch or a smaller image size.",
            )
            lacking.__cause__ = error
            self.fail(lacking)

    def _fault(self, error: Exception) -> NoReturn:
        self.say(*"".join(traceback.format_exception(error)).split("\n"))
        self.say("This is a bug in eomt-convert. Please report it with the lines above.")
        sys.exit(EomtConvertError.exit_code)


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether Python, torch on a GPU or torch on the CPU could not allocate memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's; by name, to not import torch
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _write(stream: TextIO | None, text: str) -> None:
    """Prints a text.

    Raises:
        OSError: the stream is closed or full.
    """
    if stream is None:  # it was closed before the command began
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    click.echo(_encoded(stream, text), file=stream)


def _encoded(stream: TextIO | None, text: str) -> str:
    """A text, with escapes for the characters that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _discard(stream: TextIO | None) -> None:
    """Keeps Python from flushing buffered text, at exit, to a stream that cannot be written."""
    if stream is not None:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Commands(click.Group):
    """A group whose help and usage errors, printed by click, go through `Session` as well."""

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


dtype_option = click.option(
    "--dtype",
    type=click.Choice(get_args(Dtype)),
    default="float32",
    help="Type of the model's weights; they are added in float32 and rounded once.",
)

shard_size_option = click.option(
    "--max-shard-size", metavar="SIZE", help="Largest file of weights, such as 2GB."
)

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

_MODES = get_args(Compile)

compile_option = click.option(
    "--compile",
    type=click.Choice(_MODES),
    help="Compile the network with torch.compile; on its own, in the default mode.",
)


class CompilingCommand(click.Command):
    """A command with `compile_option`, whose value may be left out.

    click would take whatever follows for the value, such as the name of a model.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        given = [
            f"{argument}={_MODES[0]}"
            if argument == "--compile" and following not in _MODES
            else argument
            for argument, following in pairwise([*args[:end], ""])
        ]
        return super().parse_args(ctx, [*given, *args[end:]])


threads_option = click.option(
    "--threads", type=click.IntRange(1), help="Threads on the CPU. [default: torch's]"
)

report_option = click.option(
    "--report",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.html",
    help="Also write the verdict as an HTML page.",
)

offline_option = click.option(
    "--offline", is_flag=True, help="Use only the cache, like HF_HUB_OFFLINE=1."
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
    shown: bool, *, of: Literal["bytes", "pictures", "stages"] = "bytes"
) -> "Iterator[Progress]":
    """Gives a function that shows a stage's progress: its name, what is done and the total."""
    if not shown:
        yield lambda *_: None
        return
    from rich import progress as rich
    from rich.console import Console

    name = rich.TextColumn("{task.description}", markup=False)
    columns: tuple[rich.ProgressColumn, ...] = (
        rich.SpinnerColumn(),
        name,
        rich.TimeElapsedColumn(),
    )
    if of != "stages":
        counts = rich.DownloadColumn() if of == "bytes" else rich.MofNCompleteColumn()
        columns = (name, rich.BarColumn(), counts, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield advance
