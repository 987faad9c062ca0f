"""The real command line, parsed and not run: for every place that writes `tandem …` down."""

from __future__ import annotations

from typing import Any

import typer.main

from tandem.cluster.cli import app


def parse(arguments: list[str]) -> dict[str, Any]:
    """The values of `tandem ARGUMENTS`; typer raises a usage error for a wrong flag or value."""
    group: Any = typer.main.get_command(app)
    with group.context_class(group, info_name="tandem") as outer:
        name, command, rest = group.resolve_command(outer, list(arguments))
        return command.make_context(name, rest, parent=outer).params
