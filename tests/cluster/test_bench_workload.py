"""What the load generator sends: the same to everyone at one seed, with the lengths and the sharing that were asked."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.cluster.bench.answer import Answer
from tandem.cluster.bench.dialogue import Dialogue
from tandem.cluster.bench.options import BenchOptions, EndpointType, Workload, check
from tandem.cluster.bench.workload import Session, Turn, arrivals, sessions
from tandem.common.errors import ConfigError

# Three requests in Mooncake's format; the first two share two blocks, the third came before them in time.
TRACE = [
    {"timestamp": 3000, "input_length": 1100, "output_length": 30, "hash_ids": [5, 6, 7]},
    {"timestamp": 4000, "input_length": 1536, "output_length": 20, "hash_ids": [5, 6, 8]},
    {"timestamp": 1000, "input_length": 100, "output_length": 10, "hash_ids": [9]},
]


def first(options: BenchOptions, count: int, seed: str = "s") -> list[Session]:
    return list(itertools.islice(sessions(options, seed), count))


def prompts(options: BenchOptions, count: int, seed: str = "s") -> list[list[int]]:
    return [list(session.turns[0].ids) for session in first(options, count, seed)]


def common(one: list[int], other: list[int]) -> int:
    """Tokens of the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("workload", [Workload.random, Workload.shared_prefix, Workload.multi_turn])
def test_prompts_follow_from_the_seed_alone(workload: Workload) -> None:
    options = BenchOptions(workload=workload, input_len=40, range_ratio=0.5, prefix_len=20)
    assert first(options, 5) == first(options, 5)
    assert first(options, 5) != first(options, 5, seed="other")


def test_random_prompts_have_their_length_and_their_vocabulary() -> None:
    found = prompts(BenchOptions(input_len=50, vocab_size=30), 20)
    assert {len(prompt) for prompt in found} == {50}
    assert {token for prompt in found for token in prompt} == set(range(10, 30))


def test_lengths_vary_within_the_range_ratio() -> None:
    options = BenchOptions(input_len=100, output_len=10, range_ratio=0.5)
    turns = [session.turns[0] for session in first(options, 2000)]
    assert {len(turn.ids) for turn in turns} == set(range(50, 151))
    assert {turn.output_len for turn in turns} == set(range(5, 16))


def test_a_group_shares_its_prefix_and_nothing_else() -> None:
    options = BenchOptions(workload=Workload.shared_prefix, prefix_len=30, groups=2, input_len=50, vocab_size=100_000)
    one, other, again, _ = prompts(options, 4)
    assert len(one) == 80
    assert common(one, again) == 30  # groups take turns: 0, 1, 0, 1
    assert common(one, other) == 0


def test_poisson_arrivals_have_the_mean_and_the_spread_of_a_poisson_process() -> None:
    gaps = gaps_of(BenchOptions(request_rate=4.0), 20_000)
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.05)  # of an exponential distribution: its mean


@pytest.mark.parametrize(("burstiness", "relative_spread"), [(0.25, 2.0), (4.0, 0.5)])
def test_burstiness_is_the_shape_of_a_gamma_distribution(burstiness: float, relative_spread: float) -> None:
    gaps = gaps_of(BenchOptions(request_rate=10.0, burstiness=burstiness), 40_000)
    assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(relative_spread, rel=0.05)


def test_infinite_burstiness_is_a_constant_pace() -> None:
    assert gaps_of(BenchOptions(request_rate=8.0, burstiness=float("inf")), 10) == pytest.approx([0.125] * 10)


def gaps_of(options: BenchOptions, count: int) -> list[float]:
    due = list(itertools.islice(arrivals(options, "s"), count + 1))
    return [later - earlier for earlier, later in itertools.pairwise(due)]


# --------------------------------------------------------------------------------------------------------------- traces
@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write(tmp_path, *TRACE)


def write(folder: Path, *lines: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_trace_is_replayed_in_time_with_its_lengths_and_its_sharing(trace: Path) -> None:
    options = BenchOptions(workload=Workload.trace, trace=trace, vocab_size=100_000)
    found = first(options, 9)
    assert [session.at for session in found] == [0.0, 2.0, 3.0]
    assert [(len(session.turns[0].ids), session.turns[0].output_len) for session in found] == [
        (100, 10),
        (1100, 30),
        (1536, 20),
    ]
    alone, one, other = (list(session.turns[0].ids) for session in found)
    assert common(one, other) == 2 * 512
    assert common(alone, one) == 0


def test_another_round_sends_other_tokens_with_the_same_sharing(trace: Path) -> None:
    options = BenchOptions(workload=Workload.trace, trace=trace, vocab_size=100_000)
    (_, one, other), (_, one_later, other_later) = prompts(options, 3), prompts(options, 3, seed="later")
    assert common(one_later, other_later) == common(one, other)
    assert common(one, one_later) == 0


def test_a_trace_is_shrunk_and_hurried(trace: Path) -> None:
    options = BenchOptions(workload=Workload.trace, trace=trace, scale_lengths=0.1, speed=4.0, vocab_size=100_000)
    found = first(options, 9)
    assert [session.at for session in found] == [0.0, 0.5, 0.75]
    assert [len(session.turns[0].ids) for session in found] == [10, 110, 153]  # 3 blocks of 51 hold no 154th
    assert [session.turns[0].output_len for session in found] == [1, 3, 2]
    assert common(list(found[1].turns[0].ids), list(found[2].turns[0].ids)) == 2 * 51


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "trace.jsonl:2: expected an object"),
        ("[1]", "trace.jsonl:2: expected an object"),
        ({"timestamp": 0, "input_length": 5, "output_length": 1}, "trace.jsonl:2: expected an object"),
        (TRACE[2] | {"input_length": 600}, "trace.jsonl:2: 600 tokens are 2 blocks of 512, not 1"),
        (TRACE[2] | {"input_length": 0}, "input_length at least 1"),
        (TRACE[2] | {"output_length": 1.5}, "whole numbers"),
        (TRACE[2] | {"hash_ids": ["a"]}, "whole numbers"),
    ],
)
def test_a_malformed_trace_is_told_with_its_line(tmp_path: Path, line: Any, told: str) -> None:
    options = BenchOptions(workload=Workload.trace, trace=write(tmp_path, TRACE[0], line))
    with pytest.raises(ConfigError, match=told):
        first(options, 1)


def test_a_missing_or_empty_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the trace .*nowhere"):
        first(BenchOptions(workload=Workload.trace, trace=tmp_path / "nowhere"), 1)
    with pytest.raises(ConfigError, match="has no requests"):
        first(BenchOptions(workload=Workload.trace, trace=write(tmp_path)), 1)


# -------------------------------------------------------------------------------------------------------- conversations
def said(text: str, *token_ids: int) -> Answer:
    return Answer(len(token_ids), text=text, token_ids=list(token_ids), tokens=len(token_ids))


def test_a_conversation_in_tokens_carries_prompts_and_answers() -> None:
    dialogue = Dialogue(BenchOptions(), "m", turns=2)
    opening = json.loads(dialogue.body(Turn([11, 12], 2)))
    dialogue.heard(said("", 13, 14))
    second = json.loads(dialogue.body(Turn([15], 4)))
    assert (opening["prompt"], second["prompt"]) == ([11, 12], [11, 12, 13, 14, 15])
    assert (opening["max_tokens"], second["max_tokens"], second["ignore_eos"]) == (2, 4, True)
    assert dialogue.path == "/v1/completions"


def test_a_conversation_in_text_carries_prompts_and_answers() -> None:
    dialogue = Dialogue(BenchOptions(endpoint_type=EndpointType.chat), "m", turns=2)
    opening = json.loads(dialogue.body(Turn([10, 11, 10], 2)))["messages"]
    dialogue.heard(said("well"))
    second = json.loads(dialogue.body(Turn([12], 2)))["messages"]
    assert second[:2] == [*opening, {"role": "assistant", "content": "well"}]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    words = opening[0]["content"].split()
    assert words[0] == words[2] != words[1]
    assert dialogue.path == "/v1/chat/completions"


def test_an_answer_without_token_ids_cannot_be_carried_on() -> None:
    dialogue = Dialogue(BenchOptions(), "m", turns=2)
    answer = replace(said("", 13), token_ids=[])
    dialogue.heard(answer)
    assert answer.failure is not None and "--endpoint-type chat" in answer.failure.message


def test_extra_body_overrides() -> None:
    dialogue = Dialogue(BenchOptions(extra_body='{"temperature": 0.5, "top_k": 3}'), "m", turns=1)
    body = json.loads(dialogue.body(Turn([11], 2)))
    assert (body["temperature"], body["top_k"], body["model"]) == (0.5, 3, "m")


# ---------------------------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (BenchOptions(workload=Workload.trace), "needs --trace"),
        (BenchOptions(trace=Path("x")), "--trace says nothing to --workload random"),
        (BenchOptions(turns=2), "--turns says nothing"),
        (BenchOptions(workload=Workload.disturbed, concurrency=2), "--concurrency says nothing"),
        (BenchOptions(concurrency=2, request_rate=1.0), "closed loop"),
        (BenchOptions(max_concurrency=2), "--request-rate"),
        (BenchOptions(burstiness=2.0), "--request-rate"),
        (BenchOptions(save_requests=True), "--save FILE"),
        (BenchOptions(plot=Path("x.pdf")), r"\.png or \.svg"),
        (BenchOptions(save=Path("/no/such/folder/x.json")), "no folder /no/such/folder"),
    ],
)
def test_flags_that_contradict_each_other(options: BenchOptions, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(options)


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:fast", "speed:5", "ttft:-1"])
def test_objectives_that_mean_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match="METRIC:MILLISECONDS"):
        _ = BenchOptions(goodput=[text]).objectives


def test_objectives_in_every_spelling() -> None:
    wanted = {"ttft": 500.0, "itl": 50.5}
    assert BenchOptions(goodput=["ttft:500", "itl:50.5"]).objectives == wanted
    assert BenchOptions(goodput=["ttft:500,itl:50.5"]).objectives == wanted
    as_vllm = BenchOptions(goodput=["ttft:500"], servers=["itl:50.5", "http://h:1"])
    assert (as_vllm.objectives, as_vllm.server_arguments) == (wanted, ["http://h:1"])


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_an_extra_body_that_is_no_object(text: str) -> None:
    with pytest.raises(ConfigError, match="--extra-body"):
        _ = BenchOptions(extra_body=text).extra
