"""The bulkhead: a step that fails ends the sequence that makes it fail, not its neighbours and not the worker.

    [ a b c d e f g h ] raises
    [ a b c d ] passes: used   [ e f g h ] raises
                               [ e f ] passes: used   [ g h ] raises
                                                      [ g ] passes: used   [ h ] raises: h ends with an error

Invariant: Engine.forward changes no sequence and writes only the KV of the step's own tokens, so any part of a step
may be computed again. One offender among n costs about 2 log2 n more runs, at most 2n - 1 if all fail.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from tandem.common.errors import InvalidRequest, WorkerFailed
from tandem.engine.batch import Sampled, Scheduled

log = logging.getLogger(__name__)

Forward = Callable[[list[Scheduled]], list[Sampled]]


class Bulkhead:
    def __init__(self, limit: int = 3) -> None:
        self._limit = limit
        self._failures = 0  # steps in a row in which nothing could be computed

    def run(self, forward: Forward, scheduled: list[Scheduled]) -> list[Sampled]:
        """What `forward` returns, in its order; a sequence that makes it fail has a result with `error`.

        The caller drops every sequence with an error, those that do not sample in this step too, before it advances
        the others. Raises WorkerFailed at once, and any other exception when the engine is broken: when `limit` steps
        in a row failed for all of their sequences.
        """
        faults = list[Exception]()
        results = self._parts(forward, scheduled, faults)
        self._failures = self._failures + 1 if len(faults) == len(scheduled) else 0
        if self._failures >= self._limit:
            raise faults[-1]
        return results

    def _parts(self, forward: Forward, scheduled: list[Scheduled], faults: list[Exception]) -> list[Sampled]:
        """`faults` collects what each offender raised; a request that is at fault itself says nothing of the engine."""
        try:
            return forward(scheduled)
        except WorkerFailed:
            raise
        except Exception as exc:
            if len(scheduled) > 1:
                log.warning("a step of %d sequences failed (%s); trying its halves", len(scheduled), exc)
                half = len(scheduled) // 2
                first = self._parts(forward, scheduled[:half], faults)
                return first + self._parts(forward, scheduled[half:], faults)
            sequence = scheduled[0].sequence
            log.exception("request %s fails alone; it ends, the others go on", sequence.request_id)
            if not isinstance(exc, InvalidRequest):
                faults.append(exc)
            error = f"the engine failed while computing this request ({type(exc).__name__}); try again"
            return [Sampled.failed(sequence, error)]
