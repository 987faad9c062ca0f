"""Write docs/configuration.md from the command line's own declarations, or with --check tell whether it is stale."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from tandem.cluster.cli import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """# Configuration
Everything is a flag; some can also be set by an environment variable. There is no configuration file. This page is
generated (`make docs`); `tandem COMMAND --help` says the same.

Only in the environment, because command lines are visible to every user of a machine:

| variable | |
|---|---|
| `TANDEM_CLUSTER_KEY` | At least 32 hex digits, the same in every process of a cluster |

`tandem serve` draws a key for its own processes when none is set; processes started one by one need it.

For tests and drills, see [reliability](reliability.md): `TANDEM_FAILPOINTS` and `TANDEM_FAILPOINT_DIR` arm faults at
named places in the code (`common/failpoints.py`). Nothing is armed without them.
"""


def page() -> str:
    group: Any = typer.main.get_command(app)
    sections = [section(name, command) for name, command in group.commands.items() if not command.hidden]
    return "\n".join([HEAD, *sections])


def section(name: str, command: Any) -> str:
    help_text = (command.help or "").strip().split("\n\n")[0].replace("\n", " ")
    lines = [f"## `tandem {name}`", help_text, "", "| flag | default | environment | |", "|---|---|---|---|"]
    return "\n".join([*lines, *rows(command), ""])


def rows(command: Any) -> Iterator[str]:
    for parameter in sorted(command.params, key=lambda one: one.param_type_name != "argument"):
        if parameter.name in ("help", "install_completion", "show_completion"):
            continue
        names = [parameter.name.upper()] if parameter.param_type_name == "argument" else flag_names(parameter)
        named = ", ".join(f"`{name}`" for name in names)
        variable = f"`{parameter.envvar}`" if parameter.envvar else ""
        help_text = (parameter.help or "").replace("|", "\\|").replace("\n", " ")
        yield f"| {named} | {default_of(parameter)} | {variable} | {help_text} |"


def flag_names(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def default_of(parameter: Any) -> str:
    value = getattr(parameter.default, "value", parameter.default)
    if value is None or value == () or callable(value):
        return "required" if parameter.required else ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`"


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"error: docs/{PAGE.name} is stale; run `make docs` and commit the result")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
