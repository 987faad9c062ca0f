"""Keeps secrets out of logs and error messages."""

from __future__ import annotations

import re

HIDDEN = "***"

_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    # scheme://user:password@host and scheme://:password@host, to the last @ as a password may have one
    (re.compile(r"(?<=://)([^\s/@:]*):\S+@"), rf"\1:{HIDDEN}@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+"), rf"\1 {HIDDEN}"),
    # names that end in a word for a secret, then = or : or a blank (a flag and its value), then the value
    (
        re.compile(
            r"""(?ix) (?P<name> (?<![a-z0-9]) (?: [\w-]*[_-] )?
                    (?: api[_-]?key | cluster[_-]?key | secret(?:[_-]?key)? | passwo?r?d | passwd | passphrase
                      | (?:access|auth|hf|refresh|session)[_-]?token | authorization )
                    ["']? (?: \s*[=:]\s* | (?<=key)\s+ | (?<=token)\s+ | (?<=password)\s+ ) ["']? )
                (?! \s | \*\*\* | (?:bearer|basic)\s ) [^\s"',;&)}\]]+""",
        ),
        rf"\g<name>{HIDDEN}",
    ),
    # well-known shapes: OpenAI-style and Hugging Face keys
    (re.compile(r"\b(sk-|hf_)[A-Za-z0-9_-]{12,}"), rf"\1{HIDDEN}"),
)


def redact(text: str, secrets: tuple[str, ...] = ()) -> str:
    """`text` without `secrets` and without what looks like a password, key or token."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
