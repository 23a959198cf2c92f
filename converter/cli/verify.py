"""``eomt-convert verify``."""

import sys
from pathlib import Path

import click

from converter.cli.session import Session, common_options
from converter.errors import OutputsDifferError


@click.command("verify")
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
