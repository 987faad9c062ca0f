"""The official openai client against a running 1P1D cluster."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.integration.local_cluster import LocalCluster

QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Tandem serves large language models. Answer the question in one or two sentences."},
    {"role": "user", "content": "What is Tandem?"},
]


@pytest.fixture
def client(demo: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m"]
    assert client.models.retrieve("m").id == "m"


def test_chat_ends_by_itself_and_is_the_same_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="m", messages=QUESTION, temperature=0, max_tokens=200)
    answer = whole.choices[0]
    assert answer.finish_reason == "stop" and answer.message.content and "Tandem" in answer.message.content
    assert whole.usage is not None and whole.usage.completion_tokens > 5
    chunks = list(
        client.chat.completions.create(
            model="m", messages=QUESTION, temperature=0, max_tokens=200, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completions_with_several_prompts_and_choices(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="m", prompt=["Tandem serves", "A block"], n=2, max_tokens=6, temperature=0.8, seed=3
    )
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    again = client.completions.create(
        model="m", prompt=["Tandem serves", "A block"], n=2, max_tokens=6, temperature=0.8, seed=3
    )
    assert [choice.text for choice in again.choices] == [choice.text for choice in done.choices]


def test_logprobs_are_of_the_tokens_sent(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="m", messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    logprobs = done.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 8
    assert "".join(item.token for item in logprobs.content) == done.choices[0].message.content
    for item in logprobs.content:
        assert len(item.top_logprobs) == 3 and item.top_logprobs[0].token == item.token, "greedy takes the likeliest"
        assert item.logprob <= 0


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    free = client.chat.completions.create(model="m", messages=QUESTION, temperature=0, max_tokens=100)
    text = free.choices[0].message.content or ""
    stop = text[9:14]
    cut = client.chat.completions.create(model="m", messages=QUESTION, temperature=0, max_tokens=100, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"


def test_errors_have_the_clients_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as empty:
        client.chat.completions.create(model="m", messages=[])
    assert empty.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="m", prompt="word " * 9000, max_tokens=10)
    assert long.value.code == "context_length_exceeded" and "maximum context length is" in long.value.message
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model="m", messages=QUESTION, temperature=9)
    assert hot.value.param == "temperature"


def test_a_stream_that_is_closed_leaves_no_block_behind(client: openai.OpenAI, demo: LocalCluster) -> None:
    for after in (0, 1, 5):
        stream = client.completions.create(
            model="m",
            prompt="Tandem " * 100,
            max_tokens=900,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in zip(range(after), stream, strict=False):
            pass
        stream.close()
        demo.assert_at_rest(timeout=2.0)
