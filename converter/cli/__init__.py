"""The command line: parses, calls, prints."""

from converter.cli.convert import main
from converter.cli.look import inspect_command, list_command
from converter.cli.verify import verify_command

for command in (list_command, inspect_command, verify_command):
    main.add_command(command)

__all__ = ["main"]
