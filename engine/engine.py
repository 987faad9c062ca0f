"""One model on one device, or one tensor-parallel group: token ids in, tokens out. It knows no requests, no peers.

    engine = Engine.load(config)
    sampled = engine.forward(scheduled)      one step: KV of all scheduled tokens, a token for those that finish
    engine.store.read(blocks)                KV blocks as bytes, for the hand-off
    engine.close()

Which tokens are computed and which blocks they use is the schedulers' business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from tandem.common.errors import ConfigError, InvalidRequest
from tandem.engine.batch import Sampled, Scheduled, build_batch
from tandem.engine.config import EngineConfig
from tandem.engine.models.transformer import StepOutput
from tandem.engine.parallel import Command, Followers, ShardedStore
from tandem.engine.plan import Plan
from tandem.engine.rank import Rank
from tandem.engine.runner import pack
from tandem.engine.sampler import NOT_FINITE, look, sample

logger = logging.getLogger(__name__)

OnLayers = Callable[[int, int], None]  # (first layer, number of layers)


class Engine:
    """Used by one thread at a time. After a WorkerFailed it is broken: close it and load another."""

    def __init__(self, plan: Plan, rank: Rank, followers: Followers) -> None:
        self.layout = plan.layout
        self.dtype, self.quantization = plan.dtype, plan.quantization or "none"
        self.store = rank.cache if rank.group.world == 1 else ShardedStore(plan.layout, rank, followers)
        self.num_blocks = rank.cache.num_blocks
        self.max_model_len = _fitting_len(plan, self.num_blocks)
        self.vocab_size = plan.model.vocab_size
        self.attention_backend = rank.attention.name
        self.why = rank.why
        self.device = plan.device(0)
        self._rank = rank
        self._followers = followers

    @classmethod
    def load(cls, config: EngineConfig, on_progress: Callable[[int, int], None] | None = None) -> Engine:
        """Load weights, size the KV cache, start the other ranks. `on_progress(done, total)` counts bytes.

        Raises ModelError naming the file at fault, ConfigError naming the flag, WorkerFailed when a rank is lost.
        """
        plan = Plan.make(config)
        if plan.config.tensor_parallel_size > 1 and plan.device_type == "cpu":
            # the ranks share the cores that this process was given
            torch.set_num_threads(max(1, torch.get_num_threads() // plan.config.tensor_parallel_size))
        followers = Followers(plan.config)
        try:
            rank = Rank.load(plan, followers.join(plan.device(0)), on_progress)
            engine = cls(plan, rank, followers)
        except BaseException:
            followers.close()
            raise
        engine._announce(plan)
        return engine

    @torch.inference_mode()
    def forward(
        self, scheduled: list[Scheduled], on_layers: OnLayers | None = None, layer_group: int = 1
    ) -> list[Sampled]:
        """Compute one step and sample for the items whose `samples` is true. Results are in the order of `scheduled`.

        The sequences are not changed, so a failed step, or a part of it, can be repeated (isolation.py). A sequence
        with hidden states that are not finite, or that cannot be sampled, gets a Sampled with `error`, even if it
        does not sample in this step; it does not disturb the others. Raises WorkerFailed when a rank is lost.

        `on_layers` is called on this thread each time `layer_group` more layers are computed (the last group may be
        smaller): the KV of those layers is final for all scheduled tokens. On CUDA it is so in the order of the
        current stream: read it there, or let another stream wait for an event recorded in the call. Whether a
        sequence failed is known only behind the last layer. With more ranks than one it is never called: each has
        only its heads.
        """
        if not scheduled:
            return []
        packed = pack(build_batch(scheduled), self.layout.block_size)
        self._check_tokens(scheduled)
        after_layer = None
        if on_layers is not None and self._rank.group.world == 1:
            after_layer = _grouped(on_layers, layer_group, self.layout.layers)
        with self._followers.together(Command.FORWARD, packed):
            output = self._rank.runner.forward(packed, after_layer)
        results = _results(output, scheduled)
        self._rank.group.check()
        return results

    def prepare(self) -> bool:
        """Make a little ready for steps to come, while there is none; whether there is more of it to do.

        Called by the thread that will run the steps: it stays on this worker's own cores from now on.
        """
        if self._rank.cores is not None:
            self._rank.cores.stay_home()
        return self._rank.cache.prepare()

    def post_prompts(self, count: int) -> None:
        """A prefill worker says how many prompts it has, to whoever shares this machine's cores with it."""
        if self._rank.cores is not None:
            self._rank.cores.post_prompts(count)

    def prompts_elsewhere(self) -> int:
        """How many prompts wait for, or are computed on, cores that this worker shares with prefill workers."""
        return self._rank.cores.prompts_elsewhere() if self._rank.cores is not None else 0

    def describe(self) -> dict[str, object]:
        """What was loaded and chosen, and why; for people."""
        return {
            "device": str(self.device),
            "dtype": self.dtype,
            "quantization": self.quantization,
            "kv_cache_dtype": self.layout.dtype,
            "kv_blocks": self.num_blocks,
            "kv_tokens": self.num_blocks * self.layout.block_size,
            "max_model_len": self.max_model_len,
            "attention": f"{self.attention_backend} ({self.why})",
        }

    def close(self) -> None:
        """End the other ranks; no other process can map the KV cache any more. Idempotent."""
        self._followers.close()
        self._rank.cache.close()

    def _check_tokens(self, scheduled: list[Scheduled]) -> None:
        """An id beyond the vocabulary would read foreign memory or, on CUDA, end the process."""
        for item in scheduled:
            start = item.sequence.computed
            chunk = item.sequence.token_ids[start : start + item.num_tokens]
            if min(chunk) < 0 or max(chunk) >= self.vocab_size:
                identity = item.sequence.request_id
                raise InvalidRequest(f"request {identity} has a token id outside 0 … {self.vocab_size - 1}")

    def _announce(self, plan: Plan) -> None:
        logger.info("Model: %s in %s, revision %.12s", plan.model.architecture, plan.dtype, self.layout.revision)
        tokens = self.num_blocks * self.layout.block_size
        concurrency = tokens / self.max_model_len
        logger.info("KV cache size: %d tokens in %d blocks of %s", tokens, self.num_blocks, self.layout.dtype)
        logger.info("Maximum concurrency for %d tokens per request: %.2fx", self.max_model_len, concurrency)
        logger.info("Attention backend: %s (%s) on %s", self.attention_backend, self.why, self.device)


def _results(output: StepOutput, scheduled: list[Scheduled]) -> list[Sampled]:
    peaks, finite = look(output.logits, output.finite)
    sampled = iter(sample(output.logits, [item.sequence for item in scheduled if item.samples], peaks))
    results = list[Sampled]()
    for item, sound in zip(scheduled, finite, strict=True):
        result = next(sampled) if item.samples else None
        if not sound:
            result = Sampled.failed(item.sequence, NOT_FINITE)
        if result is not None:
            results.append(result)
    return results


def _grouped(on_layers: OnLayers, size: int, layers: int) -> Callable[[int], None]:
    """Calls `on_layers` behind the last layer of each group of `size`."""

    def after_layer(index: int) -> None:
        count = index % size + 1
        if count == size or index == layers - 1:
            on_layers(index + 1 - count, count)

    return after_layer


def _fitting_len(plan: Plan, num_blocks: int) -> int:
    """The longest sequence: what was asked for, or as much of the model's own length as the cache holds."""
    held = num_blocks * plan.layout.block_size
    if plan.max_model_len <= held:
        return plan.max_model_len
    if plan.config.max_model_len is not None:
        raise ConfigError(
            f"the KV cache holds {held} tokens, max_model_len {plan.max_model_len} needs more: "
            "raise kv_cache_memory_bytes or gpu_memory_utilization, or lower max_model_len"
        )
    logger.warning("The KV cache holds %d tokens of the model's %d: max_model_len is lowered", held, plan.max_model_len)
    return held
