"""Small random models of every family, made and computed by transformers: the oracle of the engine's tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tandem.common.request import Leg, SamplingParams
from tandem.engine.batch import Scheduled
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.sequence import Sequence

VOCAB = 199  # odd, so that it does not split evenly
BLOCK = 8
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-llama3-rope-tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn-rope": ("Llama", {"rope_parameters": YARN_ROPE}),
    "llama-biases-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral-window": ("Mistral", {"sliding_window": 20, "head_dim": 24}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied-window": (
        "Qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True, "num_key_value_heads": 4}),
}


def build(name: str, directory: Path, **overrides: Any) -> Any:
    """The transformers model `name`, also saved into `directory`. Every weight is random, biases and norms too."""
    import transformers

    family, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**(COMMON | settings | overrides))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(mean=1.0 if "norm" in key else 0.0, std=0.15)
    model.save_pretrained(directory)
    return model


def oracle_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """(len(token_ids), vocab)."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]


def oracle_generate(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return output[0, len(prompt) :].tolist()


def engine_config(directory: Path, **overrides: Any) -> EngineConfig:
    settings: dict[str, Any] = {"block_size": BLOCK, "device": "cpu", "kv_cache_memory_bytes": 4 << 20}
    return EngineConfig(model=str(directory), **(settings | overrides))


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()


def sequence(prompt: list[int], blocks: list[int], max_tokens: int = 1) -> Sequence:
    made = Sequence.from_leg(Leg("r", 0, tuple(prompt), SamplingParams(max_tokens, temperature=0.0)), 0.0)
    made.blocks = blocks
    return made


@dataclass
class Greedy:
    """The least scheduler that can drive an engine: blocks are never given back, chunks have `chunk` tokens."""

    engine: Engine
    chunk: int = 11
    next_block: int = 0
    running: list[Sequence] = field(default_factory=list)

    def add(self, prompt: list[int], max_tokens: int, blocks: list[int] | None = None, computed: int = 0) -> Sequence:
        """`blocks` hold the KV of the first `computed` tokens."""
        blocks = list(blocks or [])
        needed = -(-(len(prompt) + max_tokens) // self.engine.layout.block_size) - len(blocks)
        blocks += range(self.next_block, self.next_block + needed)
        self.next_block += needed
        assert self.next_block <= self.engine.num_blocks
        made = sequence(prompt, blocks, max_tokens)
        made.computed = computed
        self.running.append(made)
        return made

    def step(self) -> None:
        scheduled = [Scheduled(item, min(self.chunk, item.remaining)) for item in self.running]
        sampled = self.engine.forward(scheduled)
        for item in scheduled:
            item.sequence.computed += item.num_tokens
        for result in sampled:
            result.sequence.token_ids.extend(result.token_ids)
        self.running = [item for item in self.running if not item.finish_reason()]

    def run(self) -> None:
        while self.running:
            self.step()


def generate(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    greedy = Greedy(engine)
    made = [greedy.add(prompt, count) for prompt in prompts]
    greedy.run()
    return [item.output_ids for item in made]
