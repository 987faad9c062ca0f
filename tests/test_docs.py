"""What the pages say is there, is there: links, commands, `make` targets, the messages of the protocol."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from tandem.common import handoff
from tests.command_line import parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("k8s/*.md")]


def code_of(page: Path) -> list[str]:
    """The lines of code blocks, and code spans."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for block in blocks for line in block.splitlines()] + spans


GENERATED = "configuration.md"
CODE = sorted({line.strip() for page in PAGES if page.name != GENERATED for line in code_of(page)})
COMMANDS = [line.removeprefix("tandem ").partition("#")[0] for line in CODE if re.match(r"tandem [a-z]", line)]
PLACEHOLDERS = {"[MODEL]": "", " N": " 1", " M": " 1"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_what_the_command_line_takes(command: str) -> None:
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value)
    parse(shlex.split(command))


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    mentioned = {line.split()[1] for line in CODE if re.match(r"make [a-z]", line)}
    assert {target for target in mentioned if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def test_protocol_page_names_every_message_with_its_kind_and_fields() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    rows = {
        name: (int(kind), row) for kind, name, row in re.findall(r"^\| (\d+) \| `(\w+)` \| (.*)$", page, re.MULTILINE)
    }
    messages = get_args(handoff.Message)
    assert {message.__name__: message.KIND for message in messages} == {name: kind for name, (kind, _) in rows.items()}
    for message in messages:
        fields = {field.name for field in dataclasses.fields(message)}
        assert {name for name in re.findall(r"`(\w+)`", rows[message.__name__][1]) if name in fields} == fields
