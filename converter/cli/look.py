"""``eomt-convert list`` and ``eomt-convert inspect``."""

from pathlib import Path

import click

from converter.cli.session import SOURCE, Session, common_options, hub_options


@click.command("list")
@common_options
def list_command(as_json: bool, debug: bool) -> None:
    """Show the catalogue of checkpoints."""
    from converter import report
    from converter.catalog import CATALOG

    session = Session(as_json=as_json, debug=debug)
    session.show(report.catalogue_table(), {"checkpoints": [entry.to_dict() for entry in CATALOG]})


@click.command("inspect")
@click.argument("source", metavar=SOURCE)
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
        from converter.hub.access import Access
        from converter.hub.sources import fetch
        from converter.places import parse_source
        from converter.weights.inspection import inspect
        from converter.weights.tensorfiles import damage, open_tensors

        fetched = fetch(parse_source(source), Access.of(token, cache_dir, offline))
        with open_tensors(fetched.weights) as file:
            found = inspect(file)
        if found.wrong_checksums:
            session.say(f"Warning: {damage(fetched.weights, found.wrong_checksums)}")
        session.show(report.inspection(found), found.to_dict())
