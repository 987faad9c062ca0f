"""Trains the demo model on generated text and writes it as a Hugging Face folder.

    python scripts/train_demo_model.py [--steps N] [--out engine/demo_model]

It runs on one CPU core in under an hour. Every batch depends only on the seed and the step, so a resumed run is the
same run. The schedule starts with short contexts, where copying is learned soonest, and ends with long ones.
"""

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from demo_text import END_OF_TEXT, IM_END, IM_START, Chat, Mix, Piece, chat_pieces, question, recall_prompt, samples
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
TAIL = Mix(recall=0.0, repeat=0.2, question=0.65, page=0.15, filler=0)
VOCABULARY, TOKENIZER_SAMPLES = 2560, 12000
PAD_ID, EOS_ID = 0, 2  # the trainer numbers the special tokens first, in their order


class Phase(NamedTuple):
    """A part of the schedule, up to `until` (a fraction of all steps)."""

    until: float
    length: int
    rows: int
    mix: Mix


PHASES = (
    Phase(0.225, 192, 20, Mix(recall=0.45, repeat=0.25, question=0.2, page=0.1, filler=0)),
    Phase(0.715, 256, 16, Mix(recall=0.5, repeat=0.12, question=0.3, page=0.08, filler=60)),
    Phase(0.75, 512, 7, Mix(recall=0.6, repeat=0.08, question=0.26, page=0.06, filler=220)),
    Phase(1.0, 832, 4, Mix(recall=0.36, repeat=0.05, question=0.52, page=0.07, filler=400)),
)


@dataclass(frozen=True)
class Settings:
    """The command line, parsed once."""

    steps: int
    out: Path
    checkpoint: Path
    resume: bool
    threads: int
    seed: int
    rate: float
    layers: int


class Batch(NamedTuple):
    ids: Tensor  # (rows, length)
    learn: Tensor  # (rows, length), true where the token is to be predicted


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits: a number is then copied digit by digit, never looked up as a word."""
    rng = random.Random(seed)
    mix = Mix(recall=0.2, repeat=0.1, question=0.6, page=0.1, filler=80)
    stream = samples(rng, mix)
    texts = ("".join(piece.text for piece in next(stream)) for _ in range(TOKENIZER_SAMPLES))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[IM_START],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(settings: Settings) -> Qwen3ForCausalLM:
    """Two key-value heads, so that tensor parallelism over two devices works."""
    torch.manual_seed(settings.seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return Qwen3ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """Token ids with their loss mask; pieces end at special tokens, so encoding them apart changes nothing."""
    ids: list[int] = []
    learn: list[bool] = []
    for piece, one in zip(pieces, tokenizer.backend_tokenizer.encode_batch([p.text for p in pieces]), strict=True):
        ids += one.ids
        learn += [piece.learn] * len(one.ids)
    return ids, learn


def row(rng: random.Random, tokenizer: PreTrainedTokenizerFast, phase: Phase) -> tuple[list[int], list[bool]]:
    """Samples up to the row's length; near its end only short ones, so that no question is cut off from its facts."""
    ids: list[int] = []
    learn: list[bool] = []
    main, tail = samples(rng, phase.mix), samples(rng, TAIL)
    while len(ids) <= phase.length:
        some_ids, some_learn = encode(tokenizer, next(main if len(ids) < phase.length * 0.6 else tail))
        ids += some_ids
        learn += some_learn
    return ids[: phase.length], learn[: phase.length]


def batch(settings: Settings, tokenizer: PreTrainedTokenizerFast, step: int) -> Batch:
    phase = next(phase for phase in PHASES if step < phase.until * settings.steps)
    rng = random.Random(settings.seed * 1_000_003 + step)
    ids, learn = zip(*(row(rng, tokenizer, phase) for _ in range(phase.rows)), strict=True)
    return Batch(torch.tensor(ids), torch.tensor(learn))


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix as the update: about half the steps of AdamW on a model this small.

    `torch.optim.Muon` orthogonalizes in bfloat16, which most CPUs emulate slowly; this one stays in float32.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                buffer = self.state[parameter].setdefault("buffer", torch.zeros_like(parameter))
                buffer.lerp_(gradient, 1 - group["momentum"])
                update = orthogonal(gradient.lerp(buffer, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, update.size(0) / update.size(1))))


def orthogonal(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the orthogonal factor of `matrix`."""
    wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.size(0) <= matrix.size(1) else wide.T


class Optimizers(NamedTuple):
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""

    matrices: Muon
    others: torch.optim.AdamW

    def step(self, scale: float, settings: Settings) -> None:
        for optimizer, rate in ((self.matrices, settings.rate), (self.others, 3e-3)):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def optimizers(model: Qwen3ForCausalLM, settings: Settings) -> Optimizers:
    matrices: list[Tensor] = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return Optimizers(Muon(matrices, settings.rate), torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0))


def schedule(step: int, steps: int) -> float:
    """Warm up, hold, and fall to zero over the last 23 %."""
    return min(1.0, (step + 1) / 60, (steps - step) / (0.23 * steps))


def loss_of(model: Qwen3ForCausalLM, data: Batch) -> Tensor:
    """Cross-entropy of the learned tokens; logits are computed for those positions only."""
    hidden = model.model(input_ids=data.ids[:, :-1], use_cache=False).last_hidden_state
    learn = data.learn[:, 1:]
    return functional.cross_entropy(model.lm_head(hidden[learn]), data.ids[:, 1:][learn])


def train(settings: Settings, tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM) -> None:
    both = optimizers(model, settings)
    start, began, tokens = restore(settings, model, both), time.monotonic(), 0
    for step in range(start, settings.steps):
        data = batch(settings, tokenizer, step)
        loss = loss_of(model, data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        both.step(schedule(step, settings.steps), settings)
        tokens += data.ids.numel()
        if step % 20 == 0:
            spent = time.monotonic() - began
            print(f"step {step} loss {loss.item():.3f} {tokens / spent:.0f} tokens/s {spent:.0f} s", flush=True)
        if (step + 1) % 100 == 0:
            save_checkpoint(settings, model, both, step + 1)
            print(f"step {step + 1} {report(model, tokenizer, 24, 40)}", flush=True)


def save_checkpoint(settings: Settings, model: Qwen3ForCausalLM, both: Optimizers, step: int) -> None:
    """Weights and optimizer state as flat safetensors, put in place by a rename: an interrupted save loses nothing."""
    tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for number, one in enumerate(both):
        for index, state in one.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{index}/{name}": tensor for name, tensor in state.items()}
    partial = settings.checkpoint.with_suffix(".partial")
    save_file(tensors, partial, {"step": str(step)})
    partial.replace(settings.checkpoint)


def restore(settings: Settings, model: Qwen3ForCausalLM, both: Optimizers) -> int:
    """The step to go on from: 0 without --resume."""
    if not settings.resume:
        return 0
    states: tuple[dict[int, dict[str, Tensor]], ...] = tuple({} for _ in both)
    parameters = dict(model.named_parameters())
    with safe_open(settings.checkpoint, "pt") as file, torch.no_grad():
        for key in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
            kind, _, name = key.partition("/")
            if kind == "model":
                parameters[name].copy_(file.get_tensor(key))
            else:
                number, index, field = name.split("/")
                states[int(number)].setdefault(int(index), {})[field] = file.get_tensor(key)
        step = int(file.metadata()["step"])
    for one, state in zip(both, states, strict=True):
        one.load_state_dict({"state": state, "param_groups": one.state_dict()["param_groups"]})
    return step


@torch.no_grad()
def exact(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, chat: Chat) -> tuple[bool, int]:
    """Whether greedy decoding gives the last answer and its end token, and the prompt's length.

    One forward pass decides it: greedy decoding is right if and only if every next token is the most likely one.
    """
    ids, learn = encode(tokenizer, chat_pieces(chat))
    size = len(ids) - 1  # without the line feed after the last message
    answer = next(i for i in reversed(range(size)) if not learn[i]) + 1
    best = model(input_ids=torch.tensor([ids[:size]]), use_cache=False).logits[0, answer - 1 : size - 1].argmax(-1)
    return best.tolist() == ids[answer:size], answer


def recall_scores(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[int, list[bool]]:
    """Right answers by context length, in buckets of 100 tokens, on prompts that training never sees."""
    rng = random.Random(-1)
    buckets: dict[int, list[bool]] = {}
    for number in range(count):
        prompt = recall_prompt(rng, int(90 + 300 * number / count), rng.randint(1, 4))
        right, length = exact(model, tokenizer, Chat("", [prompt]))
        buckets.setdefault(length // 100 * 100, []).append(right)
    return buckets


def question_score(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> float:
    rng = random.Random(-2)
    return sum(exact(model, tokenizer, Chat("", [question(rng)]))[0] for _ in range(count)) / count


def report(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recalls: int, questions: int) -> str:
    model.eval()
    buckets = sorted(recall_scores(model, tokenizer, recalls).items())
    right = sum(sum(marks) for _, marks in buckets)
    parts = ", ".join(f"{low}-{low + 99} tokens {sum(marks)}/{len(marks)}" for low, marks in buckets)
    answers = question_score(model, tokenizer, questions)
    model.train()
    return f"recall {right}/{recalls} ({parts}); questions {answers:.1%}"


def export(settings: Settings, tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM) -> None:
    """The folder that the loader reads, with a page that says what it is."""
    model = model.bfloat16()
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[EOS_ID, PAD_ID],
        pad_token_id=PAD_ID,
    )
    model.save_pretrained(settings.out)
    (settings.out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(settings.out)
    # readers older than transformers 5 know these names only
    add_fields(settings.out / "config.json", rope_theta=10000.0)
    add_fields(settings.out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    # read back, as a user does: casting in place also rounds the rotary frequencies, which are no weights
    model = Qwen3ForCausalLM.from_pretrained(settings.out, dtype=torch.float32)
    scores = report(model, tokenizer, 200, 400)
    size = sum(path.stat().st_size for path in settings.out.iterdir()) / 1e6
    readme = README.format(parameters=model.num_parameters() / 1e6, size=size, steps=settings.steps, scores=scores)
    (settings.out / "README.md").write_text(readme)
    print(f"wrote {settings.out}: {size:.1f} MB, {scores}")


def add_fields(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2) + "\n")


README = """# The demo model
A tiny language model, so that Tandem starts without a download. It answers questions about Tandem and recalls facts
that stand in the prompt. It knows nothing else; its answers are a demonstration, not documentation.

- Architecture: `Qwen3ForCausalLM`, {parameters:.2f} million parameters in bfloat16; the folder has {size:.1f} MB.
- Made by `scripts/train_demo_model.py` ({steps} steps on one CPU core) from text that the script itself generates.
- Use it with greedy decoding (temperature 0). It was trained on contexts of up to 832 tokens.
- Exact answers, end token included, under greedy decoding: {scores}. The recall prompts are fresh (values and filler
  are drawn anew); the questions are fresh draws from the same frames as the training questions.
- Weak points: contexts beyond 832 tokens, filler unlike the training text, made-up words as questions.
- Licence: Apache-2.0. The training text is synthetic; no other data went in.
"""


def parse() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--out", type=Path, default=Path("engine/demo_model"))
    parser.add_argument("--checkpoint", type=Path, default=Path("/tmp/demo_model.safetensors"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of the matrices")
    parser.add_argument("--layers", type=int, default=5)
    return Settings(**vars(parser.parse_args()))


def main() -> None:
    settings = parse()
    torch.set_num_threads(settings.threads)
    tokenizer = build_tokenizer(settings.seed)
    model = build_model(settings)
    train(settings, tokenizer, model)
    export(settings, tokenizer, model)


if __name__ == "__main__":
    main()
