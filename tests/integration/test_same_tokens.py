"""The headline: what comes out of the cluster over HTTP is what transformers generates, token for token.

Every family, disaggregated and aggregated, with tensor parallelism, with shared prefixes, concurrently, and twice,
so that the second round is answered from the prefix caches.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.engine.config import EngineConfig
from tests.common.trained import write_chatml
from tests.engine.model_zoo import build
from tests.integration.local_cluster import LocalCluster

VOCAB = 512
NEW_TOKENS = 12
LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 129, 250, 500, 1000]
FAMILIES = {"llama": "llama-llama3-rope-tied", "qwen2": "qwen2", "qwen3": "qwen3", "mistral": "mistral-window"}
TOPOLOGIES = [(1, 1), (2, 2), (0, 1)]


def make_prompts(seed: int) -> list[list[int]]:
    """54 prompts: each length thrice, a third of them behind one of two shared prefixes, and six equal ones."""
    rng = random.Random(seed)
    shared = [[rng.randrange(VOCAB) for _ in range(300)] for _ in range(2)]
    prompts: list[list[int]] = []
    for length in LENGTHS:
        fresh = [rng.randrange(VOCAB) for _ in range(length)]
        forked = shared[1][: rng.randrange(1, 300)] + fresh[: rng.randrange(1, 50)]
        prompts += [fresh, (shared[0] + fresh)[:1000], forked]
    return prompts + [shared[0]] * 6


def reference(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    import torch

    answers: list[list[int]] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


class Oracle:
    """A model directory, prompts, and what transformers says to them."""

    def __init__(self, family: str, directory: Path) -> None:
        self.directory = directory
        model = build(FAMILIES[family], directory, vocab_size=VOCAB, max_position_embeddings=1280)
        write_chatml(directory)
        self.prompts = make_prompts(seed=len(family))
        self.answers = reference(model, self.prompts)


@pytest.fixture(scope="module", params=list(FAMILIES))
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(request.param, tmp_path_factory.mktemp(request.param))


def engine_config(oracle: Oracle, **changes: Any) -> EngineConfig:
    settings: dict[str, Any] = {"kv_cache_memory_bytes": 24 << 20, "max_num_batched_tokens": 256, "device": "cpu"}
    return EngineConfig(model=str(oracle.directory), **(settings | changes))


async def ask(client: httpx.AsyncClient, prompt: list[int]) -> list[int]:
    body = {
        "model": "m", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


async def ask_all(url: str, prompts: list[list[int]]) -> list[list[int]]:
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
        return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))


def assert_same(cluster: LocalCluster, oracle: Oracle) -> None:
    for turn in ("cold", "from the prefix caches"):
        answers = asyncio.run(ask_all(cluster.url, oracle.prompts))
        wrong = [i for i, answer in enumerate(answers) if answer != oracle.answers[i]]
        assert not wrong, f"{turn}: prompts {wrong} of lengths {[len(oracle.prompts[i]) for i in wrong]} differ"


@pytest.mark.parametrize(("prefill", "decode"), TOPOLOGIES, ids=lambda count: str(count))
def test_cluster_generates_what_transformers_does(oracle: Oracle, prefill: int, decode: int) -> None:
    with LocalCluster(engine_config(oracle), prefill, decode) as cluster:
        assert_same(cluster, oracle)


def test_tensor_parallel_cluster_generates_what_transformers_does(oracle: Oracle) -> None:
    with LocalCluster(engine_config(oracle, tensor_parallel_size=2), 1, 1) as cluster:
        assert_same(cluster, oracle)
