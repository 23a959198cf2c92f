"""The command line: parses, calls, prints."""

from converter.cli.convert import main
from converter.cli.evaluate import evaluate_command
from converter.cli.export import export_command
from converter.cli.look import inspect_command, list_command
from converter.cli.make_delta import make_delta_command
from converter.cli.publish import push_command, release_command
from converter.cli.record import record_command
from converter.cli.segment import segment_command
from converter.cli.verify import verify_command

for command in (
    list_command,
    inspect_command,
    verify_command,
    record_command,
    export_command,
    make_delta_command,
    push_command,
    release_command,
    segment_command,
    evaluate_command,
):
    main.add_command(command)

__all__ = ["main"]
