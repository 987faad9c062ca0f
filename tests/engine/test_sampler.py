"""Tokens follow the distribution that was asked for, and depend on nothing but logits, seed, choice and index."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tandem.common.request import Leg, SamplingParams
from tandem.engine import sampler
from tandem.engine.batch import Sampled
from tandem.engine.sampler import look, uniform
from tandem.engine.sequence import Sequence

VOCAB = 50


def make(prompt: list[int] | None = None, output: list[int] | None = None, **sampling: Any) -> Sequence:
    choices = sampling.pop("choices", (0,))
    params = SamplingParams(max_tokens=1000, **{"temperature": 0.0, **sampling})
    return Sequence.from_leg(Leg("r", 0, tuple(prompt or [1]), params, choices, tuple(output or [])), arrival=0.0)


def make_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
    return sampler.sample(logits, sequences, look(logits, torch.empty(0, dtype=torch.bool))[0])


def one(logits: torch.Tensor, sequence: Sequence) -> int:
    (sampled,) = sample(logits[None], [sequence])
    assert sampled.error == ""
    (token,) = sampled.token_ids
    return token


def draws(logits: torch.Tensor, count: int, **sampling: Any) -> np.ndarray:
    """How often each token comes in `count` draws, (vocab,)."""
    (sampled,) = sample(logits[None], [make(choices=tuple(range(count)), **sampling)])
    return np.bincount(sampled.token_ids, minlength=len(logits))


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's test, at six standard deviations of the chi-square distribution."""
    kept = probabilities > 0
    assert not counts[~kept].any()
    expected = probabilities[kept] * counts.sum()
    assert expected.min() >= 5, "too few draws for the test"
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    assert statistic <= freedom + 6 * math.sqrt(2 * max(freedom, 1)), statistic


def test_greedy_is_the_argmax_and_the_lowest_id_among_equals() -> None:
    logits = make_logits(6).bfloat16()
    logits[0, [7, 30, 11]] = 99.0
    before = logits.clone()
    tokens = [sampled.token_ids for sampled in sample(logits, [make() for _ in range(6)])]
    assert tokens == [(7,), *((int(row.argmax()),) for row in logits[1:])]
    assert torch.equal(logits, before)


def test_no_rows_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1e-9}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6}],
    ids=str,
)
def test_the_limits_of_sampling_are_greedy(sampling: dict[str, Any]) -> None:
    for seed in range(20):
        logits = make_logits(1, seed=seed)[0]
        assert one(logits, make(seed=seed, **sampling)) == int(logits.argmax())


@pytest.mark.parametrize(
    "sampling", [{"top_k": 2}, {"top_p": 0.5}, {"top_p": 0.26}, {"top_k": 3, "top_p": 0.5}], ids=str
)
def test_of_equals_the_first_are_kept_and_no_more_than_needed(sampling: dict[str, Any]) -> None:
    assert np.flatnonzero(draws(torch.zeros(4), 500, temperature=1.0, **sampling)).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 2.0, "top_k": 7}, [TemperatureLogitsWarper(2.0), TopKLogitsWarper(7)]),
        ({"temperature": 1.0, "top_k": 10_000}, []),
        ({"temperature": 1.3, "top_p": 0.8}, [TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.8)]),
        ({"temperature": 1.0, "min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"temperature": 1.0, "top_k": 9, "top_p": 0.7}, [TopKLogitsWarper(9), TopPLogitsWarper(0.7)]),
        ({"temperature": 1.5, "min_p": 0.05, "top_p": 0.9}, [
            TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.05), TopPLogitsWarper(0.9),
        ]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_draws_follow_the_distribution_of_transformers(sampling: dict[str, float], processors: list[Any]) -> None:
    logits = make_logits(1, vocab=20, seed=3) / 2
    warped = LogitsProcessorList(processors)(torch.zeros(1, 1, dtype=torch.long), logits.clone())  # pyright: ignore
    assert_follows(draws(logits[0], 20_000, **sampling), warped[0].double().softmax(-1).numpy())


def test_a_flat_distribution_needs_more_tokens_than_top_p_looks_at_first() -> None:
    logits = make_logits(1, vocab=5000)[0] * 0.01
    order = logits.double().softmax(-1).sort(descending=True)
    kept = int((order.values.cumsum(-1) < 0.9).sum()) + 1
    drawn = np.flatnonzero(draws(logits, 100_000, temperature=1.0, top_p=0.9))
    assert kept > 4000
    assert set(drawn) == set(order.indices[:kept].tolist())


def expected_token(logits: np.ndarray, p: SamplingParams, choice: int, index: int) -> int:
    """The documented algorithm in float64, one token at a time."""
    weights = np.exp((logits - logits.max()).astype(np.float64) / p.temperature)
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = [token for token in order if weights[token] >= p.min_p]
    order = order[: p.top_k or None]
    total, mass, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if mass >= p.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    digest = hashlib.blake2b(digest_size=8, person=b"tandem.sample")
    for number in (p.seed, choice, index):
        digest.update(number.to_bytes(8, "little"))
    left = (int.from_bytes(digest.digest(), "little") >> 11) / 2**53 * mass
    for token in sorted(kept):
        left -= weights[token]
        if left < 0:
            return token
    raise AssertionError("the uniform number is below 1")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.integers(-6, 6), min_size=1, max_size=30),
    temperature=st.sampled_from([0.3, 1.0, 1.9]),
    top_k=st.integers(0, 35),
    top_p=st.sampled_from([0.05, 0.41, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.37]),
    seed=st.integers(0, 2**64 - 1),
)
def test_each_token_is_the_one_the_algorithm_names(logits: list[int], seed: int, **sampling: Any) -> None:
    row = torch.tensor(logits) / 2
    sequence = make(output=[0] * 3, seed=seed, choices=(0, 1, 5), **sampling)
    (sampled,) = sample(row[None], [sequence])
    expected = [expected_token(row.numpy(), sequence.sampling, choice, 3) for choice in (0, 1, 5)]
    assert list(sampled.token_ids) == expected


def mixed_batch() -> list[Sequence]:
    random = {"temperature": 1.0, "seed": 5}
    return [
        make(),
        make(**random),
        make(**{**random, "seed": 6}, top_k=5),
        make(**random, top_p=0.9, choices=(0, 1, 2)),
        make(temperature=0.7, seed=2**64 - 1, min_p=0.1, top_p=0.5),
        make([1, 2, 3], [4, 4, 5], repetition_penalty=1.5, frequency_penalty=0.5, logprobs=2),
        make([1, 2], [3], **random, presence_penalty=1.0, logit_bias=((9, 4.0),)),
        make(**random, top_k=100, min_tokens=3, stop_token_ids=(0, 1, 2)),
    ]


@pytest.mark.parametrize("vocab", [VOCAB, 90_000])
def test_a_token_does_not_depend_on_the_batch(vocab: int) -> None:
    logits, sequences = make_logits(8, vocab), mixed_batch()
    together = sample(logits, sequences)
    alone = [sample(logits[row : row + 1], [sequence])[0] for row, sequence in enumerate(sequences)]
    assert together == alone
    assert sample(logits.flip(0), sequences[::-1]) == together[::-1]


def test_a_token_depends_on_seed_choice_and_index_only() -> None:
    logits = torch.zeros(2**16)

    def token(seed: int, choice: int, index: int) -> int:
        prompt = list(range(1 + seed + choice))  # of no influence
        return one(logits, make(prompt, [0] * index, temperature=1.0, seed=seed, choices=(choice,)))

    places = [(seed, choice, index) for seed in (0, 1, 2**40) for choice in (0, 1) for index in (0, 1, 2)][:12]
    tokens = [token(*place) for place in places]
    assert tokens == [token(*place) for place in places]
    assert len(set(tokens)) == len(places)


def test_a_request_resumed_elsewhere_continues_the_same() -> None:
    logits = make_logits(12)
    whole = make(temperature=1.0, seed=9)
    for row in logits:
        whole.token_ids.append(one(row, whole))
    resumed = make(output=whole.output_ids[:5], temperature=1.0, seed=9)
    for row in logits[5:]:
        resumed.token_ids.append(one(row, resumed))
    assert resumed.token_ids == whole.token_ids


def test_choices_drawn_together_are_those_drawn_apart() -> None:
    logits = make_logits(1)[0]
    (sampled,) = sample(logits[None], [make(temperature=1.0, seed=3, choices=(0, 1, 2, 7))])
    assert sampled.token_ids == tuple(one(logits, make(temperature=1.0, seed=3, choices=(c,))) for c in (0, 1, 2, 7))
    assert sample(logits[None], [make(choices=(0, 1))])[0].token_ids == (int(logits.argmax()),) * 2


def test_noise_never_changes() -> None:
    """Workers of different releases may continue each other's requests."""
    assert [uniform(*place) for place in ((0, 0, 0), (0, 0, 1), (2**64 - 1, 3, 1000))] == [
        0.6324276018042844,
        0.630678057547757,
        0.9665578102758401,
    ]


def test_noise_is_uniform() -> None:
    numbers = np.array(
        [uniform(seed, choice, index) for seed in range(20) for choice in range(5) for index in range(100)]
    )
    counts, _ = np.histogram(numbers, bins=50, range=(0.0, 1.0))
    assert_follows(counts, np.full(50, 1 / 50))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for seed in range(30):
        logits = make_logits(1, seed=seed)
        tokens = np.random.default_rng(seed).integers(0, VOCAB, 40).tolist()
        expected = processor(torch.tensor([tokens]), logits.clone())  # pyright: ignore
        assert one(logits[0], make(tokens[:25], tokens[25:], repetition_penalty=penalty)) == int(expected.argmax())


@pytest.mark.parametrize(("frequency", "presence"), [(0.6, 0.0), (0.0, 1.5), (0.4, -0.9), (-2.0, 2.0)])
def test_frequency_and_presence_penalties_count_the_output_only(frequency: float, presence: float) -> None:
    for seed in range(30):
        logits = make_logits(1, seed=seed)[0]
        best = int(logits.argmax())
        output = [best, best, *np.random.default_rng(seed).integers(0, VOCAB, 30).tolist()]
        expected = [
            score - output.count(token) * frequency - (token in output) * presence
            for token, score in enumerate(logits.tolist())
        ]
        prompt = list(range(VOCAB)) * 3
        sequence = make(prompt, output, frequency_penalty=frequency, presence_penalty=presence)
        assert one(logits, sequence) == int(np.argmax(expected))
        assert one(logits, make([best] * 9, frequency_penalty=frequency, presence_penalty=presence)) == best


def test_logit_bias_forces_and_forbids() -> None:
    logits = make_logits(1)[0]
    best = int(logits.argmax())
    second = int(logits.topk(2).indices[1])
    assert one(logits, make(logit_bias=((17, 100.0),))) == 17
    assert one(logits, make(logit_bias=((best, -100.0), (VOCAB + 5, 100.0)))) == second
    forced = draws(logits, 100, temperature=1.0, logit_bias=((17, 100.0),))
    assert forced[17] == 100


def test_stop_ids_are_forbidden_until_min_tokens_as_in_transformers() -> None:
    logits = torch.arange(VOCAB, dtype=torch.float32)
    stops = [VOCAB - 1, VOCAB - 2]
    processor = MinNewTokensLengthLogitsProcessor(1, 3, stops)
    for count in range(6):
        ids = torch.tensor([[1] + [5] * count])
        expected = int(processor(ids, logits[None].clone()).argmax())  # pyright: ignore
        sequence = make([1], [5] * count, min_tokens=3, stop_token_ids=(*stops, VOCAB + 99))
        assert one(logits, sequence) == expected == (VOCAB - 3 if count < 3 else VOCAB - 1)


def test_logprobs_are_those_of_the_model_whatever_was_asked_for() -> None:
    logits = make_logits(1)[0]
    exact = logits.numpy().astype(np.float64)
    exact = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    sequence = make([3], [4], temperature=0.3, top_k=4, logit_bias=((8, 50.0),), frequency_penalty=1.0, logprobs=3)
    (sampled,) = sample(logits[None], [sequence])
    (logprobs,) = sampled.logprobs
    assert sampled.token_ids == (8,)
    assert logprobs is not None
    assert logprobs.chosen == pytest.approx(exact[8], abs=1e-5)
    best = np.argsort(-exact)[:3].tolist()
    assert [token for token, _ in logprobs.top] == best
    assert [value for _, value in logprobs.top] == pytest.approx(exact[best].tolist(), abs=1e-5)


def test_logprobs_come_in_the_number_asked_for() -> None:
    logits = make_logits(4)
    without, chosen, two, every = sample(logits, [make(logprobs=count) for count in (None, 0, 2, VOCAB + 9)])
    assert without.logprobs == (None,)
    assert [len(sampled.logprobs[0].top) for sampled in (chosen, two, every) if sampled.logprobs[0]] == [0, 2, VOCAB]


@pytest.mark.parametrize("poison", [[math.nan], [math.inf], [-math.inf] * VOCAB], ids=["nan", "inf", "all -inf"])
def test_a_poisoned_row_is_an_error_of_its_own(poison: list[float]) -> None:
    logits, sequences = make_logits(8), mixed_batch()
    healthy = sample(logits, sequences)
    for row, sequence in enumerate(sequences):
        poisoned = logits.clone()
        poisoned[row, : len(poison)] = torch.tensor(poison)
        expected = [*healthy]
        expected[row] = Sampled(sequence, (), (), "the model computed values that are not finite")
        assert sample(poisoned, sequences) == expected


def test_a_token_the_model_forbids_is_no_poison() -> None:
    logits = torch.full((2, VOCAB), -math.inf)
    logits[:, 4] = 1.0
    assert [s.token_ids for s in sample(logits, [make(), make(temperature=1.0, top_p=0.9, top_k=9)])] == [(4,), (4,)]


def test_a_row_whose_sampling_raises_is_an_error_of_its_own() -> None:
    """A seed that is no unsigned 64-bit number cannot be hashed; the router never lets one through."""
    logits, sequences = make_logits(8), mixed_batch()
    healthy = sample(logits, sequences)
    sequences[3] = make(temperature=1.0, seed=-1)
    results = sample(logits, sequences)
    assert "sampling failed" in results[3].error and not results[3].token_ids
    assert results[:3] + results[4:] == healthy[:3] + healthy[4:]


@pytest.mark.parametrize("token", [-1, VOCAB, VOCAB + 5])
def test_a_token_outside_the_vocabulary_is_an_error_of_its_row(token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = sampler._choose
    monkeypatch.setattr(sampler, "_choose", lambda *inputs: [[token], *choose(*inputs)[1:]])
    failed, good = sample(make_logits(2), [make(temperature=1.0), make(temperature=1.0)])
    assert str(token) in failed.error and not failed.token_ids and not good.error


def test_logprobs_that_fail_are_an_error_of_their_row() -> None:
    failed, good = sample(make_logits(2), [make(logprobs=-3), make(logprobs=2)])
    assert failed.error and not good.error


def test_nothing_left_to_choose_is_an_error() -> None:
    sequences = [make(min_tokens=1, stop_token_ids=tuple(range(VOCAB)), temperature=t) for t in (0.0, 1.0)]
    errors = [(s.token_ids, s.error) for s in sample(make_logits(2), sequences)]
    assert errors == [((), "logit_bias and min_tokens leave no token to choose")] * 2
