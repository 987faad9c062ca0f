"""Failpoints: named places in the code where a fault can be made to happen, exactly there and exactly once.

Off unless the environment says otherwise; then `failpoint(name)` costs one look at a global. An operator's and a test's
tool: nothing that arrives on a socket can arm one.

    TANDEM_FAILPOINTS=decode.landed=kill@3,prefill.pushed=delay:0.5     in every process that sees it
    TANDEM_FAILPOINT_DIR=DIRECTORY                                      by files, in one process of many:

    NAME.arm ──the first process at the place renames it──► NAME.hit, and acts ◄── NAME.release ends hold and delay

| action        | what happens                                                                             |
|---------------|------------------------------------------------------------------------------------------|
| kill          | SIGKILL to this process                                                                  |
| stop          | SIGSTOP to this process; SIGCONT lets it go on                                           |
| raise         | RuntimeError, as a bug of ours would be                                                  |
| delay:SECONDS | the calling thread waits; in the router that is its event loop                           |
| hold          | the calling thread waits for NAME.release, at most HOLD_LIMIT seconds                    |
| drop          | `failpoint` returns True: the caller throws away what it was about to send               |

`@N` behind an action means the N-th hit only, counted in each process since it was armed. Without it, the environment
means every hit; a file always means one.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem.common.errors import ConfigError

NAMES: dict[str, str] = {
    "prefill.submitted": "P took a leg in, nothing is asked of D yet",
    "prefill.asked": "P sent Reserve",
    "prefill.granted": "P has D's Grant",
    "prefill.computed": "P computed a chunk",
    "prefill.pushed": "P's link thread sent a frame",
    "prefill.sampled": "P sampled token 1 and has not told it yet",
    "prefill.finished": "P queued the Manifest",
    "prefill.acked": "P has D's Ack",
    "prefill.aborted": "P ended a transfer with an error",
    "decode.expected": "D took a leg in that waits for its KV",
    "decode.reserve": "Reserve arrived at D",
    "decode.granted": "D reserved the blocks and sent Grant",
    "decode.landed": "a frame landed in D's blocks",
    "decode.manifest": "the Manifest arrived and is not verified yet",
    "decode.admitted": "D verified the transfer, Ack is not sent yet",
    "decode.acked": "D sent Ack",
    "decode.stepped": "D computed a step, its tokens are not published yet",
    "decode.published": "D published a step's tokens",
    "decode.aborted": "D ended a transfer with an error",
    "link.opened": "a link between P and D is set up, at either end",
    "link.beat": "a link is about to send its heartbeat; drop: it does not",
    "router.admitted": "the router admitted a request",
    "router.minted": "the router minted a ticket, no leg is open yet",
    "router.first_token": "the router has the first token of a choice, the client does not",
    "router.token": "the router has a later token, the client does not",
    "router.retry": "the router is about to try a failed attempt again",
}
ENVIRONMENT, DIRECTORY = "TANDEM_FAILPOINTS", "TANDEM_FAILPOINT_DIR"
HOLD_LIMIT = 60.0  # seconds
POLL = 0.01  # seconds between looks for a release
_PLAIN = ("kill", "stop", "raise", "hold", "drop")


@dataclass(frozen=True, slots=True)
class Action:
    kind: str
    seconds: float = 0.0  # of delay
    hit: int | None = None  # only the hit with this number, from 1


def failpoint(name: str) -> bool:
    """Whether to drop what the caller is about to send; False unless armed. `name` is one of NAMES."""
    return _armed is not None and _armed.hit(name)


def configure(environ: Mapping[str, str]) -> None:
    """Read the arming anew; done once with the process's environment at import. Raises ConfigError."""
    global _armed
    actions = _parse_all(environ.get(ENVIRONMENT, ""))
    directory = environ.get(DIRECTORY, "")
    _armed = _Armed(actions, Path(directory) if directory else None) if actions or directory else None


def arm(directory: Path, name: str, action: str) -> None:
    """Arm by file, for one hit in whichever process comes first. Raises ConfigError."""
    _check_name(name)
    parse_action(action)
    for suffix in ("hit", "release"):
        (directory / f"{name}.{suffix}").unlink(missing_ok=True)
    draft = directory / f"{name}.draft"
    draft.write_text(action)
    draft.rename(directory / f"{name}.arm")  # nobody ever reads half an action


def parse_action(text: str) -> Action:
    """`kill`, `delay:0.5`, `raise@3` … Raises ConfigError."""
    body, at, count = text.strip().partition("@")
    kind, colon, seconds = body.partition(":")
    try:
        hit = int(count) if at else None
        pause = float(seconds) if colon else 0.0
    except ValueError:
        hit, pause = 0, 0.0
    plain = kind in _PLAIN and not colon
    timed = kind == "delay" and bool(colon) and 0.0 <= pause < math.inf
    if not (plain or timed) or (hit is not None and hit < 1):
        known = ", ".join((*_PLAIN, "delay:SECONDS"))
        raise ConfigError(f"{text!r} is no failpoint action; the actions are {known}, each with an optional @N (N ≥ 1)")
    return Action(kind, pause, hit)


def _parse_all(text: str) -> dict[str, Action]:
    actions: dict[str, Action] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, action = part.partition("=")
        if not equals:
            raise ConfigError(f"{ENVIRONMENT} has {part!r}, which is no NAME=ACTION")
        _check_name(name)
        actions[name] = parse_action(action)
    return actions


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ConfigError(f"there is no failpoint {name!r}; the failpoints are {', '.join(NAMES)}")


class _Armed:
    """What is armed in this process, and how often each place was passed. Thread-safe."""

    def __init__(self, actions: dict[str, Action], directory: Path | None) -> None:
        if directory is not None and not directory.is_dir():
            raise ConfigError(f"{DIRECTORY} is {str(directory)!r}, which is no directory")
        for path in directory.glob("*.arm") if directory else ():
            _check_name(path.stem)
        self._actions, self._directory = actions, directory
        self._lock = threading.Lock()
        self._passed = Counter[str]()  # hits of names in `actions`
        self._seen = Counter[tuple[str, int, int]]()  # hits while one and the same .arm file was there

    def hit(self, name: str) -> bool:
        assert name in NAMES, f"failpoint {name!r} is not listed in NAMES"
        action = self._from_environment(name) or self._from_file(name)
        return action is not None and self._act(name, action)

    def _from_environment(self, name: str) -> Action | None:
        action = self._actions.get(name)
        if action is None:
            return None
        with self._lock:
            self._passed[name] += 1
            return action if action.hit in (None, self._passed[name]) else None

    def _from_file(self, name: str) -> Action | None:
        """The action of NAME.arm if this hit is the one it means; the rename lets only one process have it."""
        if self._directory is None:
            return None
        source, taken = self._directory / f"{name}.arm", self._directory / f"{name}.hit"
        with self._lock:
            try:
                wanted, file = parse_action(source.read_text()), source.stat()
                key = (name, file.st_ino, file.st_mtime_ns)
                self._seen[key] += 1
                if self._seen[key] < (wanted.hit or 1):
                    return None
                source.rename(taken)
            except FileNotFoundError:
                return None  # not armed, or another process was faster
            return wanted

    def _act(self, name: str, action: Action) -> bool:
        match action.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
                os._exit(128 + signal.SIGKILL)  # the first process of a container is immune to its own signals
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "raise":
                raise RuntimeError(f"failpoint {name}")
            case "delay":
                self._wait(name, action.seconds)
            case "hold":
                self._wait(name, HOLD_LIMIT)
            case _:
                return True
        return False

    def _wait(self, name: str, seconds: float) -> None:
        release = self._directory / f"{name}.release" if self._directory else None
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not (release and release.exists()):
            time.sleep(min(POLL, left))


_armed: _Armed | None = None
configure(os.environ)
