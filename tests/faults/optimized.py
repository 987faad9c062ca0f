"""The checks that must not depend on `assert`, as a script for `python -O` (E59).

    PYTHONOPTIMIZE=1 PYTHONHASHSEED=random python -m tests.faults.optimized

Ends with an error unless requests are answered with the right tokens and everything forged or damaged is refused.
"""

from __future__ import annotations

import sys
import time

from tandem.common.errors import TandemError
from tandem.common.handoff import FrameError, decode
from tandem.kv_transfer import push
from tests.fakes import expected_output
from tests.faults.scenarios import prompt
from tests.worker_pair import Call, Pair

PATIENCE = 20.0  # seconds
HOSTILE = (b"", b"\xc1", b"\x91" * 5000, b"\xdd\xff\xff\xff\xff", b"\x93\x01\xa1i\xff", b"\x92\x06\x05")


class Wrong(Exception):
    """A check failed."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Wrong(what)


def until_ended(pair: Pair, calls: list[Call]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not all(call.ended for call in calls) or not pair.at_rest():
        require(time.monotonic() < deadline, "the workers did not come to rest")
        pair.turn()


def answers_are_right(pair: Pair) -> None:
    prompts = [prompt(length, seed=length) for length in (1, 4, 5, 17, 40)]
    calls = [pair.request(f"r{len(tokens)}", tokens, max_tokens=6) for tokens in prompts]
    until_ended(pair, calls)
    for call in calls:
        require(call.error is None and call.output() == expected_output(call.leg.prompt_ids, 6), call.leg.request_id)


def strangers_are_refused(pair: Pair) -> None:
    forged = bytearray(pair.ticket("x"))
    forged[20] ^= 1
    for name, ticket in (("forged", bytes(forged)), ("another's", pair.ticket("x", decode_incarnation="d-0"))):
        call = pair.local(name, prompt(3), ticket=ticket)
        require(isinstance(call.decode.error, TandemError), f"a {name} ticket was taken")
    for token in (997, (1 << 32) - 1):
        call = pair.local("stranger", [1, token])
        require(isinstance(call.decode.error, TandemError), f"token id {token} was taken")
    for data in HOSTILE:
        try:
            decode(data)
        except FrameError:
            continue
        raise Wrong(f"{data[:8]!r} was taken for a message")


def damage_is_noticed(pair: Pair) -> None:
    """The digests are not those of what is sent: it must not be decoded."""
    original = push.piece_digests
    push.piece_digests = lambda payload, transfer_id: tuple(bytes(16) for _ in original(payload, transfer_id))
    try:
        call = pair.request("damaged", prompt(30, seed=99), max_tokens=4)
        until_ended(pair, [call])
    finally:
        push.piece_digests = original
    require(isinstance(call.error, TandemError) and not call.decode.tokens, "a wrong digest went unnoticed")


def main() -> None:
    if __debug__:
        sys.exit("run this with PYTHONOPTIMIZE=1")
    pair = Pair()
    answers_are_right(pair)
    strangers_are_refused(pair)
    damage_is_noticed(pair)
    answers_are_right(pair)
    counts = (pair.p.pool.counts(), pair.d.pool.counts())
    require(all(count.at_rest for count in counts), f"blocks are missing: {counts}")
    pair.close()
    print("all right")


if __name__ == "__main__":
    main()
