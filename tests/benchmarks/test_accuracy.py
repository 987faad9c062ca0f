"""The accuracy benchmark: its arithmetic against sums written out, and what it says of models whose order is known."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import DEMO, Tally, Text, compare, demo_texts, line, plain_texts
from tests.engine.model_zoo import build, tokens


def test_sums_are_those_written_out() -> None:
    wanted, given = [[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]], [[0.0, 2.0, 1.0], [1.0, 0.0, 0.5]]
    tally = Tally()
    tally.add(Text([0, 1]), torch.tensor(wanted).double(), torch.tensor(given).double())
    row = tally.row("kind")

    def shares(logits: list[float]) -> list[float]:
        total = sum(map(math.exp, logits))
        return [math.exp(logit) / total for logit in logits]

    divergences = [
        sum(p * math.log(p / q) for p, q in zip(shares(p_row), shares(q_row), strict=True))
        for p_row, q_row in zip(wanted, given, strict=True)
    ]
    assert row.positions == 2
    assert row.top1 == 0.5
    assert row.kl_mean == pytest.approx(sum(divergences) / 2)
    assert row.kl_p99 == pytest.approx(min(divergences) + 0.99 * abs(divergences[0] - divergences[1]))
    assert row.perplexity == pytest.approx(1 / shares(given[0])[1])
    assert row.exact == {}


def test_a_constant_added_to_a_row_of_logits_changes_nothing() -> None:
    wanted = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
    tally = Tally()
    tally.add(Text(list(range(5))), wanted, wanted + torch.arange(5)[:, None])
    row = tally.row("kind")
    assert row.top1 == 1.0
    assert row.kl_mean < 1e-12 and row.logits < 1e-12


def test_an_answer_is_exact_if_every_token_of_it_is_the_likeliest() -> None:
    """The prompt's own tokens are not, and do not matter; nor does what would come behind the answer."""
    text = Text([3, 0, 1, 2], start=2, group="recall")
    right = torch.eye(4)[[3, 1, 2, 0]].double()
    wrong = torch.eye(4)[[3, 1, 3, 0]].double()
    tally = Tally()
    for given in (right, wrong, right, right):
        tally.add(text, right, given)
    row = tally.row("kind")
    assert row.exact == {"recall": 0.75}
    assert line(row).endswith("| 75.0% |")


def test_fewer_bits_are_less_accurate_and_float32_is_the_reference(tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    kinds = ["float32", "bfloat16", "int8", "int4"]
    own, *rows = compare(str(tmp_path), kinds, (Text(tokens(300, seed)) for seed in range(2)))
    assert [row.kind for row in rows] == kinds
    assert {row.positions for row in rows} == {600}
    assert own.kl_mean == 0.0
    assert 0.0 <= rows[0].kl_mean < 1e-6 and rows[0].logits < 1e-4
    for better, worse in pairwise(rows):
        assert 2 * better.kl_mean < worse.kl_mean
        assert better.kl_p99 < worse.kl_p99
        assert better.logits < worse.logits
        assert better.top1 >= worse.top1
    assert rows[0].perplexity == pytest.approx(own.perplexity, rel=1e-4)


def test_the_demo_prompts_are_those_of_training_with_their_answers() -> None:
    """The first piece is what the chat template makes of the question; the second ends with the end token."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    texts = list(demo_texts(2, 3))
    assert [text.group for text in texts] == ["recall"] * 2 + ["questions"] * 3
    for text in texts:
        prompt, answer = tokenizer.decode(text.ids[: text.start]), tokenizer.decode(text.ids[text.start :])
        user = prompt.removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
        messages = [{"role": "user", "content": user}]
        assert prompt == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert answer.endswith("<|im_end|>") and answer.count("<|im_end|>") == 1
    assert list(demo_texts(2, 3)) == texts


def test_a_file_is_cut_into_pieces_that_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("Tandem serves large language models. " * 300)
    pieces = list(plain_texts(str(DEMO), path))
    assert len(pieces) > 2 and all(len(piece.ids) == 512 for piece in pieces[:-1])
    assert all(piece.start == 1 and not piece.group for piece in pieces)
