"""A session as a server's API hears it: each request carries the earlier prompts and the server's own answers."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tandem.cluster.bench.answer import Answer
from tandem.cluster.bench.options import BenchOptions, EndpointType
from tandem.cluster.bench.workload import Turn

# Common words, each one token to most tokenizers: what a token id is to a chat, which takes text only.
_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
one you were all her she there would their we him been has when who will no more if out so up said what its
about than into them can only other time new some could these two may first then do any like my now over such
our man me even most made after also well did many before must years where much your way down should because
long each just state those people too how little good world make very year still see own work men day here old
between both life being
""".split()  # noqa: SIM905  # a list of words reads better as words


class Dialogue:
    """`body` and `heard` take turns."""

    def __init__(self, options: BenchOptions, model: str, turns: int) -> None:
        self._chat = options.endpoint_type is EndpointType.chat
        self.path = "/v1/chat/completions" if self._chat else "/v1/completions"
        self._needs_ids = turns > 1 and not self._chat
        self._ids: list[int] = []
        self._messages: list[Mapping[str, str]] = []
        self._fixed: dict[str, object] = {
            "model": model,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if self._needs_ids:
            self._fixed["return_token_ids"] = True
        self._extra = options.extra

    def body(self, turn: Turn) -> bytes:
        if self._chat:
            words = " ".join(_WORDS[token_id % len(_WORDS)] for token_id in turn.ids)
            self._messages.append({"role": "user", "content": words})
        else:
            self._ids += turn.ids
        prompt = {"messages": self._messages} if self._chat else {"prompt": self._ids}
        body = self._fixed | prompt | {"max_tokens": turn.output_len} | self._extra
        return json.dumps(body, separators=(",", ":")).encode()

    def heard(self, answer: Answer) -> None:
        """A complete answer; fails it if it cannot be carried on."""
        if self._needs_ids and len(answer.token_ids) != answer.tokens:
            told = "the server does not tell its answers' token ids (return_token_ids); use --endpoint-type chat"
            answer.fail("no token ids", told)
        self._ids += answer.token_ids
        self._messages.append({"role": "assistant", "content": answer.text})
