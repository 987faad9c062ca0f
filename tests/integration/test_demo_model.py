"""The packaged model does what the README promises: readable answers that end, and facts recalled from the prompt."""

from __future__ import annotations

import random

import httpx
import pytest

from tests.integration.local_cluster import LocalCluster

FILLER = [
    "The router sends each request to a prefill worker.",
    "A decode worker keeps many sequences in one batch.",
    "Blocks are reserved before they are filled.",
    "The cache keeps what was computed before.",
    "Both pools can grow and shrink on their own.",
]


def chat(url: str, content: str) -> tuple[str, str, int]:
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 120}
    response = httpx.post(url + "/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer = response.json()
    choice = answer["choices"][0]
    return choice["message"]["content"], choice["finish_reason"], answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What is Tandem?", ["Tandem", "prefill", "decode"]),
        ("what does a prefill worker do", ["prompt", "KV"]),
        ("How do I scale the pools?", ["tandem scale"]),
        ("Hello!", ["Tandem"]),
    ],
)
def test_it_answers_and_ends_by_itself(demo: LocalCluster, question: str, words: list[str]) -> None:
    text, reason, _ = chat(demo.url, question)
    assert reason == "stop"
    assert all(word in text for word in words), text
    assert text.endswith((".", "?", "!"))


def test_it_recalls_a_code_from_a_prompt_of_hundreds_of_tokens(demo: LocalCluster) -> None:
    rng = random.Random(5)
    right = 0
    for _ in range(5):
        code = "".join(rng.choice("0123456789") for _ in range(4))
        filler = [rng.choice(FILLER) for _ in range(30)]
        filler.insert(rng.randrange(30), f"Remember: the access code of the blue door is {code}.")
        text, reason, tokens = chat(demo.url, " ".join(filler) + " What is the access code of the blue door?")
        assert tokens > 250
        right += reason == "stop" and code in text
    assert right >= 4, "a random code cannot be guessed"
