"""What 16 bits and quantized weights cost in accuracy: the engine's logits against those of transformers in float32.

    python benchmarks/accuracy.py                                  the demo model, on prompts that training never saw
    python benchmarks/accuracy.py MODEL --text FILE --kinds bfloat16,int8,int4

A kind is what a user chooses: a --dtype, or a --quantization with the checkpoint's own dtype. Every position of every
text counts, computed in chunks through the paged KV cache like a prompt; a token's numbers are the same bits in decode.

    top-1        how often the likeliest token is the reference's
    KL           of the reference's distribution to the kind's, in nats: mean, and 99th percentile of the positions
    logits       ‖difference‖ / ‖reference‖ over everything; each row less its mean, which means nothing
    perplexity   of the tokens to be predicted: the answers of the demo's prompts, all tokens of a text
    exact        answers that greedy decoding gives to the last token, by kind of prompt: it does if and only if each
                 token, behind those before it, is the likeliest
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tandem.engine
from tandem.common.kv_layout import ELEMENT_BYTES
from tandem.engine.batch import Batch
from tandem.engine.config import EngineConfig
from tandem.engine.group import Group
from tandem.engine.plan import QUANTIZATIONS, Plan
from tandem.engine.rank import Rank
from tandem.engine.runner import pack

DEMO = Path(tandem.engine.__file__).resolve().with_name("demo_model")
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
KINDS = ["float32", "bfloat16", "int8", "int4"]
CHUNK = 256  # tokens of a step
WINDOW = 512  # tokens of a text that is cut into pieces
KV_BYTES = 256 << 20
Forward = Callable[[list[int]], Tensor]  # token ids -> logits (len(ids), vocab) float32


@dataclass(frozen=True, slots=True)
class Text:
    ids: list[int]
    start: int = 1  # ids[start:] are to be predicted
    group: str = ""  # of prompts whose answers ids[start:] are; "": plain text


@dataclass(slots=True)
class Tally:
    """What one kind has come to so far."""

    same: int = 0  # positions with the reference's likeliest token
    divergences: list[Tensor] = field(default_factory=list[Tensor])  # a text each: (positions,) nats
    difference: float = 0.0  # sums of squares
    reference: float = 0.0
    surprise: float = 0.0  # nats, of all tokens to be predicted
    predicted: int = 0
    exact: dict[str, list[bool]] = field(default_factory=dict[str, list[bool]])  # by group

    def add(self, text: Text, reference: Tensor, logits: Tensor) -> None:
        """Both (positions, vocab), float64."""
        wanted, given = reference.log_softmax(-1), logits.log_softmax(-1)
        self.divergences.append((wanted.exp() * (wanted - given)).sum(-1))
        best = logits.argmax(-1)
        self.same += int((best == reference.argmax(-1)).sum())
        self.difference += float((_centered(logits) - _centered(reference)).square().sum())
        self.reference += float(_centered(reference).square().sum())
        answer = torch.tensor(text.ids[text.start :])
        before = slice(text.start - 1, len(text.ids) - 1)
        self.surprise -= float(given[before].gather(-1, answer[:, None]).sum())
        self.predicted += len(answer)
        if text.group:
            self.exact.setdefault(text.group, []).append(bool((best[before] == answer).all()))

    def row(self, kind: str) -> Row:
        divergences = torch.cat(self.divergences)
        return Row(
            kind=kind,
            positions=len(divergences),
            top1=self.same / len(divergences),
            kl_mean=float(divergences.mean()),
            kl_p99=float(divergences.quantile(0.99)),
            logits=math.sqrt(self.difference / self.reference),
            perplexity=math.exp(self.surprise / self.predicted),
            exact={group: sum(marks) / len(marks) for group, marks in self.exact.items()},
        )


def _centered(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class Row:
    kind: str
    positions: int
    top1: float
    kl_mean: float
    kl_p99: float
    logits: float
    perplexity: float
    exact: dict[str, float]  # shares


# ----------------------------------------------------------------------------------------------------------- forward


def reference(model: str) -> Forward:
    """By transformers, in float32."""
    import transformers

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def forward(ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return loaded(torch.tensor([ids]), use_cache=False).logits[0]

    return forward


def engine(model: str, kind: str) -> Forward:
    """By the engine as a worker loads it on the CPU. Raises ConfigError for an unknown kind."""
    dtype, quantization = (kind, None) if kind in ELEMENT_BYTES else ("auto", kind)
    config = EngineConfig(model, dtype, kv_cache_memory_bytes=KV_BYTES, quantization=quantization, device="cpu")
    rank = Rank.load(Plan.make(config), Group())
    size = config.block_size

    def forward(ids: list[int]) -> Tensor:
        blocks = list(range(-(-len(ids) // size)))
        parts = list[Tensor]()
        for start in range(0, len(ids), CHUNK):
            end = min(start + CHUNK, len(ids))
            count = end - start
            positions, rows = list(range(start, end)), list(range(count))  # logits of every row
            batch = Batch(ids[start:end], positions, [0, count], [end], [blocks], rows)
            parts.append(rank.runner.forward(pack(batch, size)).logits.clone())
        return torch.cat(parts)

    return forward


# ------------------------------------------------------------------------------------------------------------- texts


def demo_texts(recalls: int, questions: int) -> Iterator[Text]:
    """The prompts by which scripts/train_demo_model.py judges the model: other seeds than training's."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    demo: Any = importlib.import_module("demo_text")
    tokenizer, rng = _tokenizer(str(DEMO)), random.Random(-1)
    for number in range(recalls):
        turn = demo.recall_prompt(rng, int(90 + 300 * number / recalls), rng.randint(1, 4))
        yield _dialogue(demo, tokenizer, turn, "recall")
    rng = random.Random(-2)
    for _ in range(questions):
        yield _dialogue(demo, tokenizer, demo.question(rng), "questions")


def _dialogue(demo: Any, tokenizer: Any, turn: tuple[str, str], group: str) -> Text:
    """Up to the answer's end token. Pieces end at special tokens, so encoding them apart changes nothing."""
    prompt, answer, _ = demo.chat_pieces(demo.Chat("", [turn]))
    ids = tokenizer.encode(prompt.text)
    return Text(ids + tokenizer.encode(answer.text), len(ids), group)


def plain_texts(model: str, path: Path) -> Iterator[Text]:
    """A file, cut into pieces of WINDOW tokens."""
    ids = _tokenizer(model).encode(path.read_text())
    for start in range(0, len(ids) - 1, WINDOW):
        piece = ids[start : start + WINDOW]
        if len(piece) > 1:
            yield Text(piece)


def _tokenizer(model: str) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model)


# ------------------------------------------------------------------------------------------------------------ report


def compare(model: str, kinds: list[str], texts: Iterator[Text]) -> list[Row]:
    """The reference itself is the first row. All models are in memory at once."""
    wanted, forwards = reference(model), {kind: engine(model, kind) for kind in kinds}
    tallies = {kind: Tally() for kind in ("transformers float32", *kinds)}
    for text in texts:
        logits = wanted(text.ids).double()
        for kind, tally in tallies.items():
            tally.add(text, logits, forwards[kind](text.ids).double() if kind in forwards else logits)
    return [tally.row(kind) for kind, tally in tallies.items()]


def headings(rows: list[Row]) -> list[str]:
    return [
        "kind",
        "top-1",
        "KL mean",
        "KL p99",
        "logits",
        "perplexity",
        *(f"exact: {group}" for group in rows[0].exact),
    ]


def line(row: Row) -> str:
    cells = [row.kind, f"{row.top1:.2%}", f"{row.kl_mean:.2g}", f"{row.kl_p99:.2g}", f"{row.logits:.2%}"]
    cells += [f"{row.perplexity:.4f}", *(f"{share:.1%}" for share in row.exact.values())]
    return f"| {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory, with --text; default: the demo model")
    parser.add_argument("--text", type=Path, help="default: the demo model's own prompts")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join([*ELEMENT_BYTES, *QUANTIZATIONS])}")
    parser.add_argument("--recalls", type=int, default=100, help="prompts with facts and a question about one")
    parser.add_argument("--questions", type=int, default=400, help="prompts that are a question about Tandem")
    parser.add_argument(
        "--threads", type=int, default=1, help="more are faster on a quiet machine; they change nothing"
    )
    parser.add_argument("--save", type=Path, help="also write the rows there, as JSON")
    arguments = parser.parse_args()
    if arguments.model and not arguments.text:
        parser.error("MODEL needs --text FILE: the prompts are the demo model's own")
    return arguments


def main() -> int:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model = arguments.model or str(DEMO)
    own = demo_texts(arguments.recalls, arguments.questions)  # made when they are asked for
    texts = plain_texts(model, arguments.text) if arguments.text else own
    rows = compare(model, arguments.kinds.split(","), texts)
    print(f"| {' | '.join(headings(rows))} |\n|{'---|' * len(headings(rows))}")
    print("\n".join(map(line, rows)))
    print(f"\n{rows[0].positions} positions")
    if arguments.save:
        arguments.save.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
