"""From logits to tokens, reproducibly: a token is a function of its logits and of (seed, choice, token index).

    logits -> repetition, frequency, presence penalties -> logit bias -> min_tokens -> greedy: argmax
           -> / temperature -> weights -> min-p -> top-k -> top-p -> draw

The draw inverts the cumulative distribution of the kept tokens, in the order of their ids, at one uniform number
hashed from (seed, choice, token index). Weights are integers: sums over them are exact in any order, so neither the
batch around a row nor the device's way of summing can change a draw. Order by id, not by weight: tiny differences
between two machines' logits then move the boundaries a little, where with a sorted order two near-equal tokens
would swap places.

The host waits for the device once to look at all rows, once for all draws of a part, and once for each row whose
logprobs are wanted; everything that it sends goes through pinned memory.
"""

from __future__ import annotations

import hashlib
import logging
import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from tandem.common.request import Logprobs, SamplingParams
from tandem.engine.batch import Sampled
from tandem.engine.sequence import Sequence
from tandem.engine.upload import upload

log = logging.getLogger(__name__)

NOT_FINITE = "the model computed values that are not finite"
NO_TOKEN = "logit_bias and min_tokens leave no token to choose"
UNIT = 1 << 44  # weight of the likeliest token; a vocabulary of 2**18 such sums to 2**62, which int64 holds
CPU_ELEMENTS, DEVICE_ELEMENTS = 1 << 18, 1 << 22  # logits drawn from at a time: what caches hold; 100 MB of temporaries
HEAD = 1024  # tokens that top-p looks at first; nearly always enough, and far cheaper than sorting all
MIN_TEMPERATURE = 1e-5  # below, dividing by it overflows; the draw is the argmax long before


@dataclass(frozen=True, slots=True)
class Peaks:
    """The maximum of each row of logits."""

    ids: list[int]  # (R,) the lowest among equals
    finite: list[bool]  # (R,) False for a row with a NaN or +inf, or nothing but -inf


def look(logits: Tensor, finite: Tensor) -> tuple[Peaks, list[bool]]:
    """The peaks of `logits` (R, vocab), and `finite` (S,) on the host: one copy, one wait for the device."""
    if logits.device.type == "cpu":  # by NumPy, eight times faster than torch's maximum
        values, whole = logits.float().numpy(), _list(finite)
        ids = values.argmax(axis=-1).tolist()  # of a NaN if there is one
        return Peaks(ids, [math.isfinite(row[best]) for row, best in zip(values, ids, strict=True)]), whole
    best, best_ids = logits.max(dim=-1)  # NaN if there is one
    ids, sound, whole = _fetch(best_ids, best.isfinite(), finite)
    return Peaks(ids, [bool(ok) for ok in sound]), [bool(ok) for ok in whole]


def sample(logits: Tensor, sequences: list[Sequence], peaks: Peaks) -> list[Sampled]:
    """The next token of every choice of every sequence; `logits` (R, vocab), one row for each sequence.

    A row without a finite peak, or one whose sampling fails or leaves the vocabulary, gives a Sampled that has an
    error and no tokens; the other rows are not affected. Does not change `logits`.
    """
    chosen: list[list[int] | str] = [
        [token] * len(sequence.choices) if ok else NOT_FINITE
        for token, ok, sequence in zip(peaks.ids, peaks.finite, sequences, strict=True)
    ]
    rows = [row for row, sequence in enumerate(sequences) if peaks.finite[row] and not _is_plain(sequence.sampling)]
    elements = CPU_ELEMENTS if logits.device.type == "cpu" else DEVICE_ELEMENTS
    step = max(1, elements // logits.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        for row, drawn in zip(part, _choose_apart(logits, part, sequences), strict=True):
            chosen[row] = drawn or NO_TOKEN
    return [
        Sampled.failed(sequence, drawn) if isinstance(drawn, str) else _sampled(row, drawn, sequence)
        for row, drawn, sequence in zip(logits, chosen, sequences, strict=True)
    ]


def _choose_apart(logits: Tensor, rows: list[int], sequences: list[Sequence]) -> list[list[int] | str]:
    """`_choose` for some rows of `logits`; if that fails, row by row, so that only the offender has an error."""
    try:
        return [*_choose(logits[_ids(rows, logits.device)], [sequences[row] for row in rows])]
    except Exception as exc:
        if len(rows) == 1:
            return [_failure(exc, sequences[rows[0]])]
        return [drawn for row in rows for drawn in _choose_apart(logits, [row], sequences)]


def _sampled(logits: Tensor, ids: list[int], sequence: Sequence) -> Sampled:
    """`logits` (vocab,)."""
    foreign = [token for token in ids if not 0 <= token < len(logits)]
    if foreign:
        return Sampled.failed(sequence, f"token id {foreign[0]} was sampled, which is outside 0 … {len(logits) - 1}")
    try:
        return Sampled(sequence, tuple(ids), _logprobs(logits, ids, sequence))
    except Exception as exc:
        return Sampled.failed(sequence, _failure(exc, sequence))


def _failure(exc: Exception, sequence: Sequence) -> str:
    log.error("request %s: sampling failed", sequence.request_id, exc_info=exc)
    return f"sampling failed for this request ({type(exc).__name__})"


def uniform(seed: int, choice: int, index: int) -> float:
    """The noise of one token, in [0, 1): 53 bits of BLAKE2b over the three as unsigned little-endian 64-bit numbers."""
    message = struct.pack("<QQQ", seed, choice, index)
    digest = hashlib.blake2b(message, digest_size=8, person=b"tandem.sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _is_plain(sampling: SamplingParams) -> bool:
    """Whether the token is the argmax of the model's logits."""
    return sampling.greedy and not _is_adjusted(sampling)


def _is_adjusted(sampling: SamplingParams) -> bool:
    penalised = sampling.repetition_penalty != 1.0 or sampling.frequency_penalty or sampling.presence_penalty
    return bool(penalised or sampling.logit_bias or sampling.min_tokens)


def _choose(scores: Tensor, sequences: list[Sequence]) -> list[list[int]]:
    """One token for each choice of each row of `scores` (R, vocab), which is overwritten; none where all is -inf."""
    for row, sequence in zip(scores, sequences, strict=True):
        if _is_adjusted(sequence.sampling):
            _adjust(row, sequence)
    best, best_ids = scores.max(dim=-1)
    random = [row for row, sequence in enumerate(sequences) if not sequence.sampling.greedy]
    where, drawers = _ids(random, scores.device), [sequences[row] for row in random]
    weights = _weights(scores[where], best[where, None], drawers)
    head = HEAD
    while True:
        ids, finite, drawn, enough = _fetch(best_ids, best.isfinite(), *_draw(weights, drawers, head))
        if all(enough):  # nearly always at once
            break
        head *= 16
    tokens = [[token] * len(sequence.choices) for token, sequence in zip(ids, sequences, strict=True)]
    for place, row in enumerate(random):
        tokens[row] = drawn[place :: len(random)][: len(tokens[row])]
    return [chosen if ok else [] for chosen, ok in zip(tokens, finite, strict=True)]


def _adjust(scores: Tensor, sequence: Sequence) -> None:
    """Penalties, bias and min_tokens, in place on one row (vocab,)."""
    sampling, device = sequence.sampling, scores.device
    if sampling.repetition_penalty != 1.0:  # as in transformers: of every token seen, prompt included
        seen = _ids(set(sequence.token_ids), device)
        values = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:  # as in the OpenAI API: output only
        counts = Counter(sequence.output_ids)
        times = upload(torch.tensor(list(counts.values()), dtype=scores.dtype), device)
        scores[_ids(counts, device)] -= times * sampling.frequency_penalty + sampling.presence_penalty
    bias = {token: value for token, value in sampling.logit_bias if token < len(scores)}
    scores[_ids(bias, device)] += upload(torch.tensor(list(bias.values()), dtype=scores.dtype), device)
    if sequence.output_len < sampling.min_tokens:
        stops = _ids((token for token in sampling.stop_token_ids if token < len(scores)), device)
        scores.index_fill_(0, stops, float("-inf"))


def _weights(scores: Tensor, best: Tensor, sequences: list[Sequence]) -> Tensor:
    """(R, vocab) int64 of `scores` (R, vocab), whose maxima are `best` (R, 1): UNIT for the likeliest tokens."""
    temperature = _column((max(item.sampling.temperature, MIN_TEMPERATURE) for item in sequences), scores.device)
    return (((scores - best) / temperature.float()).exp().double() * UNIT).long()


def _draw(weights: Tensor, sequences: list[Sequence], head: int) -> tuple[Tensor, Tensor]:
    """Random tokens (choices, R) by `weights` (R, vocab), and whether for each row (R,) `head` tokens were enough."""
    weights, enough = _filter(weights, [sequence.sampling for sequence in sequences], head)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    width = max((len(sequence.choices) for sequence in sequences), default=1)
    noise = torch.tensor([_noise(sequence, width) for sequence in sequences], dtype=torch.float64).view(-1, width)
    target = torch.minimum((upload(noise, weights.device) * total).long(), total - 1)  # the float product may round up
    return torch.searchsorted(cumulative, target, right=True).T, enough


def _noise(sequence: Sequence, width: int) -> list[float]:
    numbers = [uniform(sequence.sampling.seed, choice, sequence.output_len) for choice in sequence.choices]
    return numbers + [0.0] * (width - len(numbers))


def _filter(weights: Tensor, params: list[SamplingParams], head: int) -> tuple[Tensor, Tensor]:
    """`weights` (R, vocab) int64 with the tokens that min-p, top-k and top-p exclude set to 0; and whether (R,) the
    `head` heaviest tokens were enough to tell.

    Each filter sees what the ones before it left. All three keep a prefix of the order by falling weight, then by
    rising id: exactly k tokens, and the fewest whose share reaches top_p.
    """
    enough = torch.ones(len(params), dtype=torch.bool, device=weights.device)
    if any(p.min_p > 0.0 for p in params):
        floor = _column([p.min_p * UNIT for p in params], weights.device)
        weights = weights.masked_fill(weights < floor, 0)
    if any(p.top_k > 0 or p.top_p < 1.0 for p in params):
        vocab = weights.shape[1]
        width = head if any(p.top_p < 1.0 and not 0 < p.top_k < vocab for p in params) else 1
        count, last, enough = _prefix(weights, params, width)
        weights = _keep_first(weights, count, last)
    return weights, enough


def _prefix(weights: Tensor, params: list[SamplingParams], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(R, 1) each: how many tokens of the order top-k and top-p keep, and the weight of the last of them; and whether
    (R,) it is so: looks at the `width` heaviest only, or more if a top-k is larger.
    """
    vocab = weights.shape[1]
    limits = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    width = min(vocab, max([width, *(limit for limit in limits if limit < vocab)]))
    limit = _column(limits, weights.device)
    top_p = _column([p.top_p for p in params], weights.device)
    head = weights.topk(width).values
    head = head.masked_fill(torch.arange(width, device=weights.device) >= limit, 0)
    mass = torch.where(limit < vocab, head.sum(-1, keepdim=True), weights.sum(-1, keepdim=True))
    kept = (head > 0) & (head.cumsum(dim=-1) - head < top_p * mass)
    kept[:, :1].fill_(True)
    unbounded = (limit == vocab) & (top_p >= 1.0)
    enough = ~kept[:, -1] | (limit < vocab)[:, 0] | unbounded[:, 0] | (width == vocab)
    count = kept.sum(dim=-1, keepdim=True)
    return count.masked_fill(unbounded, vocab), head.gather(1, count - 1).masked_fill(unbounded, 0), enough


def _keep_first(weights: Tensor, count: Tensor, last: Tensor) -> Tensor:
    """The `count` first of the order by falling weight and rising id, where the last of them weighs `last`."""
    heavier = weights > last
    equal = weights == last
    room = count - heavier.sum(dim=-1, keepdim=True)
    return weights.masked_fill(~(heavier | (equal & (equal.cumsum(dim=-1) <= room))), 0)


def _list(tensor: Tensor) -> list[Any]:
    return cast("list[Any]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]  (untyped in torch)


def _fetch(*tensors: Tensor) -> Iterator[list[Any]]:
    """The elements of each, in one copy: one wait for the device."""
    host = iter(_list(torch.cat([tensor.flatten() for tensor in tensors])))
    return (list(islice(host, tensor.numel())) for tensor in tensors)


def _ids(tokens: Iterable[int], device: torch.device) -> Tensor:
    return upload(torch.tensor(list(tokens), dtype=torch.long), device)


def _column(values: Iterable[float], device: torch.device) -> Tensor:
    return upload(torch.tensor(list(values), dtype=torch.float64), device)[:, None]


def _logprobs(logits: Tensor, tokens: list[int], sequence: Sequence) -> tuple[Logprobs | None, ...]:
    """Of the model's own distribution: before penalties, temperature and filters."""
    count = sequence.sampling.logprobs
    if count is None:
        return (None,) * len(tokens)
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(count, logprobs.shape[0]))
    chosen = logprobs[_ids(tokens, logits.device)]
    host_ids, *host_values = _fetch(ids.double(), values.double(), chosen.double())  # exact, as is Python's own float
    top = tuple(zip(map(int, host_ids), host_values[0], strict=True))
    return tuple(Logprobs(value, top) for value in host_values[1])
