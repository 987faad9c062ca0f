"""One line per event, nothing secret in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator

import pytest

from tandem.common import log
from tandem.common.errors import ConfigError
from tandem.common.redact import redact


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What was written to stderr; afterwards the root logger is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # pytest's own: `configure` would close them
    yield lambda: capsys.readouterr().err
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_lines_are_time_level_name_message(output: Callable[[], str]) -> None:
    log.configure("info")
    logging.getLogger("tandem.router").info("%d workers", 3)
    logging.getLogger("tandem.router").debug("not shown")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} INFO    tandem\.router 3 workers\n", output())


def test_configuring_again_replaces(output: Callable[[], str]) -> None:
    log.configure("info")
    log.configure("ERROR")
    logging.getLogger("x").error("once")
    logging.getLogger("x").warning("not shown")
    assert output().count("\n") == 1


def test_unknown_level_lists_the_levels() -> None:
    with pytest.raises(ConfigError, match=r"loud.*warning"):
        log.configure("loud")


def test_a_client_cannot_forge_lines_or_escape_sequences(output: Callable[[], str]) -> None:
    log.configure("info")
    logging.getLogger("x").info("got %s", "a\n00:00:00.000 ERROR x forged\x1b[2J\r\x85\u2028")
    text = output()
    assert text.count("\n") == 1
    assert text.endswith("got a\\n00:00:00.000 ERROR x forged\\x1b[2J\\r\\x85\\u2028\n")


def test_secrets_are_hidden_in_messages_arguments_and_tracebacks(output: Callable[[], str]) -> None:
    log.configure("info", secrets=["deadbeefcafe0123", "the"])
    logging.getLogger("x").info("the key is %s", "deadbeefcafe0123")
    try:
        raise ValueError("cannot reach redis://:hunter2@host/0 with deadbeefcafe0123")
    except ValueError:
        logging.getLogger("x").exception("failed")
    text = output()
    assert "deadbeefcafe0123" not in text
    assert "hunter2" not in text
    assert "the key is ***" in text  # "the" is too short to be a secret
    assert "Traceback" in text


SECRET = "s3cr3tVALUE"


@pytest.mark.parametrize(
    "text",
    [
        f"redis://user:{SECRET}@host:6379/0",
        f"rediss://:{SECRET}@host",
        f"redis://:a@{SECRET}@host",
        f"Authorization: Bearer {SECRET}",
        f"authorization: Basic {SECRET}",
        f"--api-key {SECRET} --port 1",
        f"--api-key={SECRET}",
        f"'api_key': '{SECRET}', 'x': 1",
        f'"apiKey": "{SECRET}"',
        f"TANDEM_CLUSTER_KEY={SECRET}",
        f"cluster_key={SECRET}",
        f"password={SECRET}&x=1",
        f"Password: {SECRET}",
        f"HF_TOKEN={SECRET}",
        f"access_token={SECRET}",
        f"client_secret={SECRET}",
        f"OPENAI_API_KEY={SECRET}",
        f"sk-proj-{SECRET}abcdef",
        f"hf_{SECRET}abcdef",
    ],
)
def test_secrets_by_shape(text: str) -> None:
    assert SECRET not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "12 tokens: 7 cached, token 5 of 9",
        "max_tokens=16 stop_token_ids=[1, 2] eos_token=</s> bos_token: <s>",
        "unix:///run/tandem/redis.sock",
        "http://127.0.0.1:8000/v1/models and redis://127.0.0.1:6379/0",
        "user@example.com",
        "invalid_api_key",
        "the cluster key is not this worker's",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


def test_redacting_twice_changes_nothing() -> None:
    once = redact(f"--api-key {SECRET} redis://:{SECRET}@h Bearer {SECRET}")
    assert redact(once) == once
