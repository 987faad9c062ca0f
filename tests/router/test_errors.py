"""Every bad request gets OpenAI's error form, the right status, and costs no worker anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from tandem.common.tokenizer import Tokenizer
from tests.router.fake_cluster import MODEL, FakeCluster, Script

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER: Any = [{"role": "user", "content": "hi"}]
BIG = 1 << 31


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fake(model_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[FakeCluster]:
    script = Script([[*tokenizer.encode("fine", False), tokenizer.eos_token_ids[0]]])
    async with FakeCluster(model_dir, script) as cluster:
        yield cluster


pytestmark = pytest.mark.asyncio(loop_scope="module")


def check(response: httpx.Response, status: int, code: str, param: str | None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and error["type"]
    return error["message"]


INVALID: list[tuple[str, dict[str, Any], str]] = [
    # path, fields beside the valid ones, param at fault
    *[(path, {"temperature": value}, "temperature") for path in (CHAT, TEXT) for value in (-0.1, 2.1, "1", True, [1])],
    *[(TEXT, {"top_p": value}, "top_p") for value in (0, -1, 1.01, 1e308, "x")],
    *[(TEXT, {"top_k": value}, "top_k") for value in (-2, BIG, 1.5, True)],
    *[(TEXT, {"min_p": value}, "min_p") for value in (-0.1, 1.1)],
    *[(TEXT, {"n": value}, "n") for value in (0, -1, 65, BIG, 1 << 63, "1", 1.0)],
    *[(TEXT, {"max_tokens": value}, "max_tokens") for value in (0, -1, BIG, 1 << 63, 10**400, "5", 1.5, True)],
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    *[(TEXT, {"frequency_penalty": value}, "frequency_penalty") for value in (-2.1, 2.1)],
    *[(TEXT, {"presence_penalty": value}, "presence_penalty") for value in (-2.1, 2.1)],
    *[(TEXT, {"repetition_penalty": value}, "repetition_penalty") for value in (0, -1, 11)],
    *[(TEXT, {"seed": value}, "seed") for value in (1 << 64, -(1 << 63) - 1, 0.5, "1")],
    *[(TEXT, {"logprobs": value}, "logprobs") for value in (-1, 21, True)],
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    *[(TEXT, {"min_tokens": value}, "min_tokens") for value in (-1, 17, BIG)],  # 17 is over the default max_tokens
    *[(TEXT, {"stop": value}, "stop") for value in ([""], "", ["a"] * 17, ["a" * 1025], 5, {"a": 1})],
    (TEXT, {"stop": ["a", 5]}, "stop"),
    *[(TEXT, {"stop_token_ids": value}, "stop_token_ids") for value in ([600], [-1], [1] * 1025)],
    (TEXT, {"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    *[(TEXT, {"logit_bias": value}, "logit_bias") for value in ({"a": 1}, {"600": 1}, {"-1": 1}, {"1": 101}, {"²": 1})],
    (TEXT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    (TEXT, {"logit_bias": [1]}, "logit_bias"),
    (TEXT, {"cache_salt": "é" * 129}, "cache_salt"),
    (TEXT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (TEXT, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (TEXT, {"stream": "yes"}, "stream"),
    *[(TEXT, {"prompt": value}, "prompt") for value in ("", [], [[]], [""], ["a", ""], [600], [-1], [[5], []], 5)],
    (TEXT, {"prompt": None}, "prompt"),
    *[(TEXT, {"prompt": value}, "prompt") for value in ([1, "a"], [1 << 63], [[1, "a"]], [True])],
    (TEXT, {"prompt": ["a"] * 600, "n": 2}, "n"),
    (TEXT, {"model": None}, "model"),
    *[(CHAT, {"messages": value}, "messages") for value in ([], "hi", None, {})],
    (CHAT, {"messages": ["hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [*USER, {"role": "robot", "content": "hi"}]}, "messages[1].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "messages"),
    (CHAT, {"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
    # known fields that this server does not honour
    *[(TEXT, {name: value}, name) for name, value in {
        "best_of": 2, "suffix": "x", "guided_json": {}, "guided_regex": "a", "structured_outputs": {"choice": ["a"]},
        "response_format": {"type": "json_object"}, "prompt_logprobs": 0, "kv_transfer_params": {"do_remote_decode": 1},
        "use_beam_search": True, "bad_words": ["x"], "priority": 1, "truncate_prompt_tokens": 5, "bootstrap_room": 1,
    }.items()],
    *[(CHAT, {name: value}, name) for name, value in {
        "tools": [{"type": "function", "function": {"name": "f"}}], "functions": [{}], "tool_choice": "required",
        "audio": {}, "modalities": ["text", "audio"], "prediction": {}, "chat_template": "{{ 1 }}", "echo": True,
        "response_format": {"type": "json_schema", "json_schema": {}}, "continue_final_message": True,
        "reasoning_effort": "high", "documents": [{}],
    }.items()],
    (TEXT, {"echo": True, "logprobs": 1}, "echo"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "fields", "param"), INVALID, ids=[f"{path[4:8]}-{str(fields)[:40]}" for path, fields, _ in INVALID]
)
async def test_invalid_field(fake: FakeCluster, path: str, fields: dict[str, Any], param: str) -> None:
    valid = {"messages": USER} if path == CHAT else {"prompt": "hi"}
    response = await fake.http.post(path, json={"model": MODEL, **valid, **fields})
    check(response, 400, "invalid_request", param)


async def test_no_invalid_request_reached_a_worker(fake: FakeCluster) -> None:
    """Runs behind the others of this file: all of the above together."""
    assert [worker.legs for worker in (*fake.prefill, *fake.decode)] == [[], []]


HARMLESS: dict[str, Any] = {
    "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True,
    "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "best_of": 1, "priority": 0,
    "unknown": 1, "guided_json": None, "stop": None, "temperature": None, "n": None, "logit_bias": None,
    "modalities": ["text"], "suffix": None, "stream_options": None,
}  # fmt: skip


async def test_harmless_fields_are_ignored(fake: FakeCluster) -> None:
    response = await fake.chat(**HARMLESS)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b"[]", b"5", b"null", b'"x"', b'{"model": NaN}', b'{"temperature": Infinity}',
        b'{"a": 1e999, "model": "tiny", "prompt": "a", "temperature": -Infinity}', b"[" * 100_000, b'{"a":' * 5000,
        b'{"prompt": "\\ud800"}', b'{"prompt": "\xff\xfe"}', b'{"model": "tiny"} trailing', b"\x80\x04\x95pickle",
    ],
    ids=range(16),
)  # fmt: skip
async def test_malformed_json(fake: FakeCluster, body: bytes) -> None:
    for path in (CHAT, TEXT, "/tokenize", "/detokenize"):
        response = await fake.http.post(path, content=body, headers={"Content-Type": "application/json"})
        check(response, 400, "invalid_request", None)


async def test_numbers_too_large_for_a_float(fake: FakeCluster) -> None:
    body = b'{"model": "tiny", "prompt": "a", "temperature": 1e999}'
    response = await fake.http.post(TEXT, content=body, headers={"Content-Type": "application/json"})
    check(response, 400, "invalid_request", "temperature")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/octet-stream", "application/x-python-pickle", "multipart/form-data; boundary=a"]
)
async def test_only_json_is_read(fake: FakeCluster, kind: str) -> None:
    response = await fake.http.post(TEXT, content=b'{"model": "tiny"}', headers={"Content-Type": kind})
    check(response, 415, "unsupported_media_type", None)


async def test_body_limit_with_and_without_declared_length(fake: FakeCluster) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 65536

    json_type = {"Content-Type": "application/json"}
    declared = await fake.http.post(TEXT, content=b" " * (1 << 20) + b"{}", headers=json_type)
    check(declared, 413, "request_too_large", None)
    streamed = await fake.http.post(TEXT, content=chunks(), headers=json_type)
    check(streamed, 413, "request_too_large", None)


async def test_unknown_routes_and_methods(fake: FakeCluster) -> None:
    check(await fake.http.get("/v1/nothing"), 404, "not_found", None)
    check(await fake.http.get("/v1/models/"), 404, "model_not_found", "model")
    check(await fake.http.get("/health/"), 404, "not_found", None)
    wrong_method = await fake.http.get(CHAT)
    check(wrong_method, 405, "method_not_allowed", None)
    assert wrong_method.headers["allow"] == "POST"


async def test_unknown_model(fake: FakeCluster) -> None:
    for path, fields in ((CHAT, {"messages": USER}), (TEXT, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        message = check(await fake.http.post(path, json={"model": "gpt-5", **fields}), 404, "model_not_found", "model")
        assert "gpt-5" in message
    check(await fake.http.get("/v1/models/gpt-5"), 404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": USER, "max_tokens": 250}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 300}]}, "messages"),
        (TEXT, {"prompt": [5] * 256}, "prompt"),
        (TEXT, {"prompt": [5] * 250, "max_tokens": 7}, "prompt"),
        (TEXT, {"prompt": [[5], [5] * 300]}, "prompt"),
    ],
)
async def test_context_length(fake: FakeCluster, path: str, fields: dict[str, Any], param: str) -> None:
    response = await fake.http.post(path, json={"model": MODEL, **fields})
    message = check(response, 400, "context_length_exceeded", param)
    assert message.startswith("This model's maximum context length is 256 tokens. However, you requested ")


async def test_the_context_can_be_filled(fake: FakeCluster) -> None:
    """The largest requests that fit: one token of room by default, and exactly what was asked."""
    for fields in ({"prompt": [5] * 255}, {"prompt": [5] * 250, "max_tokens": 6}):
        response = await fake.complete(**fields)
        assert response.status_code == 200, response.text


async def test_the_official_client_sees_codes(fake: FakeCluster) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await fake.openai.chat.completions.create(model="gpt-5", messages=USER)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        await fake.openai.completions.create(model=MODEL, prompt="a", max_tokens=1000)
    assert too_long.value.code == "context_length_exceeded"
    assert too_long.value.param == "prompt"


async def test_detokenize_and_tokenize_check_their_fields(fake: FakeCluster) -> None:
    check(await fake.http.post("/detokenize", json={"tokens": [600]}), 400, "invalid_request", "tokens")
    check(await fake.http.post("/detokenize", json={}), 400, "invalid_request", "tokens")
    check(await fake.http.post("/tokenize", json={}), 400, "invalid_request", "prompt")
    check(await fake.http.post("/tokenize", json={"prompt": "a", "messages": USER}), 400, "invalid_request", "prompt")


async def test_a_storm_of_wrong_elements_is_cheap(fake: FakeCluster) -> None:
    """pydantic would collect one error per element, on the event loop."""
    async with asyncio.timeout(2):
        response = await fake.complete(prompt=["a", *([1] * 200_000)])
    check(response, 400, "invalid_request", "prompt")


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_cancellation_nobody_asked_for_ends_the_answer(
    cluster: Callable[..., FakeCluster], streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library below cancels our task: the client must not get keep-alives for ever."""

    async def cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    async with cluster("x", keep_alive=0.1) as fake:
        monkeypatch.setattr(fake.services.completions, "_run", cancelled)
        async with asyncio.timeout(5):
            answer = await fake.complete(stream=streamed)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
