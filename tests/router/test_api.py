"""The HTTP API as clients see it, mostly through the official client."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tandem.common.tokenizer import Tokenizer
from tests.router.conftest import MakeCluster
from tests.router.fake_cluster import MODEL, FakeCluster

TEXT = "The decode worker writes one token after another. 你好，世界 👋🏽!"
USER: Any = [{"role": "user", "content": "hi"}]


async def stream_of(fake: FakeCluster, path: str, body: dict[str, Any]) -> list[Any]:
    """The events' data of a stream, parsed; the last must be [DONE]."""
    body = {"model": MODEL, "stream": True, **body}
    events: list[str] = []
    async with fake.http.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line:
                assert line.startswith("data: "), line
                events.append(line.removeprefix("data: "))
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


async def test_chat(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        fake.prefill[0].cached_tokens = 4
        answer = await fake.openai.chat.completions.create(model=MODEL, messages=USER)
        assert answer.choices[0].message.content == TEXT
        assert answer.choices[0].finish_reason == "stop"
        assert answer.id.startswith("chatcmpl-")
        leg = fake.decode[0].legs[0]
        assert answer.usage and answer.usage.prompt_tokens_details
        assert answer.usage.prompt_tokens == len(leg.prompt_ids)
        assert answer.usage.completion_tokens == len(fake.prefill[0].script.choices[0])
        assert answer.usage.prompt_tokens_details.cached_tokens == 4
        assert fake.prefill[0].legs[0].ticket == leg.ticket != b""


async def test_both_legs_of_a_request_are_one_attempt_of_our_own_id(cluster: MakeCluster) -> None:
    async with cluster("ok") as fake:
        await fake.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"}, headers={"X-Request-Id": "mine"})
        (first,), (second,) = fake.prefill[0].legs, fake.decode[0].legs
        assert (first.request_id, first.attempt) == (second.request_id, second.attempt)
        assert len(bytes.fromhex(first.request_id)) == 16  # 128 bits of ours, nothing of the client's


async def test_chat_stream_with_usage(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        stream = await fake.openai.chat.completions.create(
            model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == TEXT
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(fake.prefill[0].script.choices[0])
        assert len({chunk.id for chunk in chunks}) == 1


async def test_no_chunk_holds_a_part_of_a_character(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        events = await stream_of(fake, "/v1/chat/completions", {"messages": USER})
        texts = [event["choices"][0]["delta"].get("content", "") for event in events]
        assert "".join(texts) == TEXT
        assert "\ufffd" not in "".join(texts)
        assert "usage" not in events[-1]  # not asked


async def test_continuous_usage_counts_up(cluster: MakeCluster) -> None:
    async with cluster("one two three") as fake:
        options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        events = await stream_of(fake, "/v1/completions", {"prompt": "a", **options})
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts) and counts[0] == 1


async def test_completion(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        answer = await fake.openai.completions.create(model=MODEL, prompt="Once", max_tokens=5)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage and answer.usage.completion_tokens == 5
        assert TEXT.startswith(answer.choices[0].text)
        assert fake.decode[0].legs[0].sampling.max_tokens == 5


async def test_completion_defaults_to_16_tokens_and_chat_to_the_context(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        await fake.complete()
        await fake.chat()
        completion, chat = fake.decode[0].legs
        assert completion.sampling.max_tokens == 16
        assert chat.sampling.max_tokens == 256 - len(chat.prompt_ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_and_choices_are_numbered_prompt_first(cluster: MakeCluster, stream: bool) -> None:
    async with cluster("zero", "one") as fake:
        body = {"prompt": [[5, 6, 7], [8, 9], [5]], "n": 2, "max_tokens": 50}
        texts = [""] * 6
        if stream:
            for event in await stream_of(fake, "/v1/completions", body):
                texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        else:
            for choice in (await fake.complete(**body)).json()["choices"]:
                texts[choice["index"]] = choice["text"]
        assert texts == ["zero", "one"] * 3
        assert [leg.choices for leg in fake.prefill[0].legs] == [(0, 1)] * 3
        assert sorted(leg.prompt_ids for leg in fake.decode[0].legs) == [(5,), (5, 6, 7), (8, 9)]


async def test_prompts_as_text_list(cluster: MakeCluster, tokenizer: Tokenizer) -> None:
    async with cluster("yes") as fake:
        answer = (await fake.complete(prompt=["one two", "three"])).json()
        assert [choice["text"] for choice in answer["choices"]] == ["yes", "yes"]
        expected = {tuple(tokenizer.encode(text)) for text in ("one two", "three")}
        assert {leg.prompt_ids for leg in fake.decode[0].legs} == expected
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(cluster: MakeCluster, stream: bool) -> None:
    async with cluster(" and more") as fake:
        body = {"prompt": "Some prompt", "echo": True}
        if stream:
            events = await stream_of(fake, "/v1/completions", body)
            text = "".join(event["choices"][0]["text"] for event in events)
        else:
            text = (await fake.complete(**body)).json()["choices"][0]["text"]
        assert text == "Some prompt and more"


async def test_the_first_token_may_be_the_last(cluster: MakeCluster) -> None:
    async with cluster("abc", "") as fake:
        answer = (await fake.complete(n=2, max_tokens=1)).json()
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "stop"]
        assert answer["choices"][1]["text"] == ""
        assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stop", ["after", "token after", ["zzz", "n af", "another"]])
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_split_over_tokens(cluster: MakeCluster, stop: Any, stream: bool) -> None:
    """The text ends before the stop string, no part of which is ever sent, and the workers' legs end."""
    first = min(TEXT.index(item) for item in ([stop] if isinstance(stop, str) else stop) if item in TEXT)
    async with cluster(TEXT) as fake:
        if stream:
            events = await stream_of(fake, "/v1/completions", {"prompt": "a", "stop": stop, "max_tokens": 200})
            text = "".join(event["choices"][0]["text"] for event in events)
            reason = events[-1]["choices"][0]["finish_reason"]
        else:
            answer = (await fake.complete(stop=stop, max_tokens=200)).json()
            text, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        assert (text, reason) == (TEXT[:first], "stop")
        await fake.decode[0].all_left.wait()


async def test_include_stop_string_and_n(cluster: MakeCluster) -> None:
    """One choice stops; the others of the same legs go on."""
    async with cluster("stop here, please", "never mind") as fake:
        answer = (await fake.complete(n=2, stop="here", include_stop_str_in_output=True, max_tokens=99)).json()
        assert [choice["text"] for choice in answer["choices"]] == ["stop here", "never mind"]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "stop"]


async def test_stop_strings_count_behind_min_tokens_only(cluster: MakeCluster) -> None:
    async with cluster("a b a b a b") as fake:
        answer = (await fake.complete(stop="a", min_tokens=3, max_tokens=50)).json()
        assert len(answer["choices"][0]["text"]) > 2
        assert answer["choices"][0]["finish_reason"] == "stop"


async def test_chat_logprobs(cluster: MakeCluster) -> None:
    async with cluster("né👋") as fake:
        answer = await fake.openai.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=3)
        logprobs = answer.choices[0].logprobs
        assert logprobs and logprobs.content
        assert len(logprobs.content) == len(fake.prefill[0].script.choices[0])
        spelled = b"".join(bytes(item.bytes or []) for item in logprobs.content[:-1])  # the last is the end token
        assert spelled.decode() == "né👋"
        assert all(item.logprob == -0.5 and len(item.top_logprobs) == 3 for item in logprobs.content)
        assert logprobs.content[0].top_logprobs[2].logprob == -9999.0  # JSON has no -Infinity


async def test_completion_logprobs(cluster: MakeCluster) -> None:
    async with cluster("one two") as fake:
        whole = (await fake.complete(logprobs=1)).json()["choices"][0]["logprobs"]
        assert whole["text_offset"][0] == 0
        lengths = [len(token) for token in whole["tokens"]]
        assert whole["text_offset"] == [sum(lengths[:index]) for index in range(len(lengths))]
        assert set(whole["top_logprobs"][0]) == {whole["tokens"][0]}
        events = await stream_of(fake, "/v1/completions", {"prompt": "hi", "logprobs": 1})
        parts = [event["choices"][0]["logprobs"] for event in events]
        assert [token for part in parts for token in part["tokens"]] == whole["tokens"]
        assert [offset for part in parts for offset in part["text_offset"]] == whole["text_offset"]


async def test_sampling_reaches_both_workers(cluster: MakeCluster, tokenizer: Tokenizer) -> None:
    async with cluster("x") as fake:
        await fake.complete(
            temperature=0, top_p=0.5, top_k=7, min_p=0.1, repetition_penalty=1.5, frequency_penalty=-1,
            presence_penalty=2, logit_bias={"5": -100}, seed=-1, min_tokens=1, stop_token_ids=[9], cache_salt="me",
        )  # fmt: skip
        (leg,), (other,) = fake.prefill[0].legs, fake.decode[0].legs
        assert leg.sampling == other.sampling
        sampling = leg.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 7, 0.1)
        assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.5, -1, 2)
        assert sampling.logit_bias == ((5, -100.0),)
        assert sampling.seed == 2**64 - 1
        assert sampling.stop_token_ids == (*tokenizer.eos_token_ids, 9)
        assert leg.cache_salt == b"me"


async def test_ignore_eos_and_drawn_seeds(cluster: MakeCluster) -> None:
    async with cluster("x") as fake:
        answer = (await fake.complete(prompt=[[5], [5]], ignore_eos=True, top_k=-1, max_tokens=6)).json()
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
        first, second = fake.decode[0].legs
        assert first.sampling.stop_token_ids == ()
        assert first.sampling.top_k == 0
        assert first.sampling.seed != second.sampling.seed  # the same prompt twice is not the same answer twice


async def test_generation_config_gives_defaults(cluster: MakeCluster, model_dir: Any) -> None:
    path = model_dir / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "do_sample": True}))
    try:
        async with cluster("x") as fake:
            await fake.complete(top_k=3)
            sampling = fake.decode[0].legs[0].sampling
            assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 3, 1.0)
    finally:
        path.unlink()


async def test_models(cluster: MakeCluster) -> None:
    async with cluster("x", served_model_names=("org/name", "alias"), max_model_len=100) as fake:
        listed = [model async for model in fake.openai.models.list()]
        assert [model.id for model in listed] == ["org/name", "alias"]
        one = (await fake.http.get("/v1/models/org/name")).json()
        assert (one["id"], one["max_model_len"]) == ("org/name", 100)
        assert (await fake.complete(model="alias")).json()["model"] == "alias"


async def test_tokenize_and_detokenize(cluster: MakeCluster, tokenizer: Tokenizer) -> None:
    async with cluster("x") as fake:
        answer = (await fake.http.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True})).json()
        assert answer["tokens"] == tokenizer.encode(TEXT)
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["max_model_len"] == 256
        back = await fake.http.post("/detokenize", json={"tokens": answer["tokens"]})
        assert back.json() == {"prompt": TEXT}
        chat = (await fake.http.post("/tokenize", json={"messages": USER})).json()
        await fake.chat()
        assert tuple(chat["tokens"]) == fake.decode[0].legs[0].prompt_ids


async def test_message_parts_roles_and_template_arguments(cluster: MakeCluster, tokenizer: Tokenizer) -> None:
    async with cluster("x") as fake:
        messages = [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        ]
        await fake.chat(messages=messages, chat_template_kwargs={"enable_thinking": False})
        prompt = tokenizer.decode(fake.decode[0].legs[0].prompt_ids, skip_special_tokens=False)
        assert prompt.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>")
        assert prompt.endswith("<think>\n\n</think>\n\n")


async def test_special_tokens_from_a_user_are_text(cluster: MakeCluster, tokenizer: Tokenizer) -> None:
    async with cluster("x") as fake:
        await fake.chat(messages=[{"role": "user", "content": "<|im_end|>"}])
        end = tokenizer.eos_token_ids[0]
        assert fake.decode[0].legs[0].prompt_ids.count(end) == 2  # of the system's and the user's message


async def test_operation_endpoints(cluster: MakeCluster) -> None:
    async with cluster("x y z", prefill_expected=1) as fake:
        for path in ("/health", "/livez", "/readyz"):
            assert (await fake.http.get(path)).status_code == 200
        assert set((await fake.http.get("/version")).json()) == {"version"}
        await fake.chat()
        text = (await fake.http.get("/metrics")).text
        assert 'tandem_router_requests_total{outcome="finished"} 1.0' in text
        assert 'tandem_worker_running{role="decode",worker="decode-0"}' in text
        assert 'handler="/v1/chat/completions",method="POST",status="200"} 1.0' in text
        assert "vllm:generation_tokens_total{" in text
        openapi = (await fake.http.get("/openapi.json")).json()
        body = openapi["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"messages", "temperature", "stream"} <= set(body["properties"])
        assert "$ref" not in json.dumps(body)


async def test_status(cluster: MakeCluster) -> None:
    async with cluster("x") as fake:
        status = (await fake.http.get("/status")).json()
        assert status["model"] == MODEL
        assert [(worker["name"], worker["role"], worker["state"]) for worker in status["workers"]] == [
            ("decode-0", "decode", "ready"), ("prefill-0", "prefill", "ready")
        ]  # fmt: skip
        decode = status["workers"][0]
        assert decode["incarnation"] == fake.decode[0].incarnation
        assert decode["kv"] == {"total": 64, "free": 64, "cached": 0, "owned": 0, "reserved": 0, "quarantined": 0}


async def test_readiness_follows_the_workers(cluster: MakeCluster) -> None:
    """Decode workers alone can serve; prefill workers are waited for until the first has come, and not again."""
    async with cluster("x") as fake:
        assert (await fake.http.get("/readyz")).status_code == 200
        await fake.prefill[0].die()
        await fake.until(lambda: len(fake.members.workers()) == 1)
        assert (await fake.http.get("/readyz")).status_code == 200
        fake.members.prefill_seen = False
        assert (await fake.http.get("/readyz")).status_code == 503
        fake.members.prefill_seen = True
        await fake.decode[0].die()
        await fake.until(lambda: not fake.members.workers())
        answer = await fake.http.get("/readyz")
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert (await fake.http.get("/health")).status_code == 503
        assert (await fake.http.get("/livez")).status_code == 200


async def test_request_id_is_echoed_or_minted(cluster: MakeCluster) -> None:
    async with cluster("x") as fake:
        given = await fake.http.get("/version", headers={"X-Request-Id": "abc-1"})
        assert given.headers["x-request-id"] == "abc-1"
        minted = {(await fake.http.get("/nowhere")).headers["x-request-id"] for _ in range(2)}
        assert len(minted) == 2
        forged = await fake.http.get("/version", headers={"X-Request-Id": "x" * 500})
        assert len(forged.headers["x-request-id"]) == 32


async def test_api_key(cluster: MakeCluster) -> None:
    async with cluster("x", api_keys=("secret-1", "secret-2")) as fake:
        for path in ("/v1/models", "/status", "/openapi.json", "/version", "/nowhere", "//v1/models"):
            refused = await fake.http.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key"), path
        for path in ("/v1/completions", "/tokenize", "/detokenize"):
            wrong = await fake.http.post(path, json={}, headers={"Authorization": "Bearer secret-3"})
            assert wrong.status_code == 401
        for key in ("secret-1", "secret-2"):
            answer = await fake.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200
        for path in ("/livez", "/readyz", "/health", "/metrics"):
            assert (await fake.http.get(path)).status_code == 200


async def test_the_openapi_document_names_every_path_parameter(cluster: MakeCluster) -> None:
    """Without them schemathesis, and every client generator, refuses the document."""
    async with cluster("ok") as fake:
        document = (await fake.http.get("/openapi.json")).json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            declared = {item["name"] for item in operation.get("parameters", []) if item["in"] == "path"}
            assert declared == set(re.findall(r"\{(\w+)\}", path)), path


async def test_a_stream_has_the_id_of_every_token_also_of_those_that_are_no_text_yet(cluster: MakeCluster) -> None:
    async with cluster(TEXT) as fake:
        events = await stream_of(fake, "/v1/completions", {"prompt": "a", "max_tokens": 99, "return_token_ids": True})
        ids = [token_id for event in events for token_id in event["choices"][0]["token_ids"]]
        assert ids == fake.prefill[0].script.choices[0]
