"""Proves, before anything is started, that a model directory and the engine's flags can work.

The proof needs torch, which takes seconds to import and 200 MB to hold, so it runs in a process of its own beside
whatever else is starting: `python -m tandem.cluster.check QUESTION`, answered on stdout, both JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

from tandem.cluster import process
from tandem.common.errors import ConfigError, InternalError, ModelError, TandemError
from tandem.engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Verdict:
    directory: str = ""  # where the model lies, fetched from the hub if need be
    chat: bool = False  # it has a chat template
    fault: str = ""


class Check:
    """A running check of `engine` and `kv_connector`. Raises nothing before `wait`.

    `elsewhere`: the workers run on other machines, so what this one's devices can do is not looked at.
    """

    def __init__(self, engine: EngineConfig, kv_connector: str, elsewhere: bool) -> None:
        question = {"engine": asdict(engine), "kv_connector": kv_connector, "elsewhere": elsewhere}
        command = [sys.executable, "-m", "tandem.cluster.check", json.dumps(question)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = process.spawn(command, env=environment, stdout=subprocess.PIPE)

    def wait(self, timeout: float) -> Verdict:
        """Raises ConfigError or ModelError with the one line to print."""
        try:
            output, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as exc:
            process.stop(self._process, grace=0.0)
            raise ConfigError(f"the model was not fetched and checked within {timeout:.0f} s") from exc
        if self._process.returncode != 0 or not output:
            raise InternalError(f"checking the model ended with status {self._process.returncode}; see above")
        verdict = Verdict(**json.loads(output.splitlines()[-1]))
        if verdict.fault:
            raise ModelError(verdict.fault)
        return verdict


def check(engine: EngineConfig, kv_connector: str, elsewhere: bool) -> Verdict:
    """Raises ConfigError or ModelError."""
    from tandem.common.kv_layout import FLOAT8
    from tandem.common.tokenizer import Tokenizer
    from tandem.engine.attention import create_attention
    from tandem.engine.plan import Plan
    from tandem.kv_transfer.registry import choose

    if kv_connector == "inproc":
        raise ConfigError("the KV connector inproc works inside one process; workers need auto or torch")
    if elsewhere:
        engine = replace(engine, device="cpu", attention_backend="auto", quantization=None, deterministic=False)
    plan = Plan.make(engine)
    choose(kv_connector, plan.device(0))
    if engine.attention_backend != "auto":
        create_attention(engine.attention_backend, plan.device(0), plan.layout.dtype == FLOAT8)
    tokenizer = Tokenizer.load(plan.checkpoint.directory)
    return Verdict(directory=str(plan.checkpoint.directory), chat=tokenizer.chat_template.source is not None)


def main() -> None:
    question = json.loads(sys.argv[1])
    engine = EngineConfig(**question["engine"])
    try:
        verdict = check(engine, question["kv_connector"], question["elsewhere"])
    except TandemError as exc:
        verdict = Verdict(fault=" ".join(exc.message.split()))
    print(json.dumps(asdict(verdict)))


if __name__ == "__main__":
    main()
