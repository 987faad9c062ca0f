"""One rank's share of the engine: weights, KV cache, runner. Every rank, rank 0 too, is loaded by the same steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from tandem.common.errors import ConfigError
from tandem.common.kv_layout import FLOAT8
from tandem.engine.attention import create_attention
from tandem.engine.attention.base import AttentionBackend
from tandem.engine.attention.native import NativeAttention
from tandem.engine.batch import Batch
from tandem.engine.graphs import Graphs
from tandem.engine.group import Group
from tandem.engine.host_memory import keep_freed_memory
from tandem.engine.kernels.cores import CoreTable
from tandem.engine.kv_cache import PagedKVCache, local_layout
from tandem.engine.loader import Progress, fill_random, load_weights
from tandem.engine.models.layers import Placement
from tandem.engine.models.packed import PackedTransformer
from tandem.engine.models.transformer import Model, Transformer
from tandem.engine.plan import Plan
from tandem.engine.runner import ModelRunner, pack

logger = logging.getLogger(__name__)

CPU_KV_BYTES = 1 << 30
SAMPLER_BYTES = 256 << 20  # kept free on CUDA devices for what sampling allocates
GRAPH_BYTES = 1 << 30  # and for what graphs do: launches, and one pool of memory


@dataclass(frozen=True, slots=True)
class Rank:
    group: Group
    cache: PagedKVCache
    runner: ModelRunner
    attention: AttentionBackend
    why: str  # this attention backend
    cores: CoreTable | None  # through which this machine's workers share its cores; None: these are this worker's alone

    @classmethod
    def load(cls, plan: Plan, group: Group, on_progress: Progress | None = None) -> Rank:
        """Raises ConfigError when the weights or the least KV cache do not fit."""
        device = plan.device(group.rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            keep_freed_memory()
        attention, why = create_attention(plan.config.attention_backend, device, plan.layout.dtype == FLOAT8)
        model, cores = _load_model(plan, group, device, on_progress), None
        if isinstance(attention, NativeAttention):
            model, cores = PackedTransformer(model, attention.team, group, plan.bits), attention.cores
        num_blocks = group.minimum(_num_blocks(plan, group, model, attention))
        cache = PagedKVCache(plan.layout, num_blocks, device, group.rank, group.world)
        runner = ModelRunner(model, cache, attention, _graphs(plan, group, attention))
        return cls(group, cache, runner, attention, why, cores)


def _graphs(plan: Plan, group: Group, attention: AttentionBackend) -> Graphs | None:
    """For decode steps on one CUDA device, by the kernels that skip what fills up a batch."""
    if plan.device_type != "cuda" or group.world > 1 or attention.name != "triton":
        return None
    return Graphs(plan.device(group.rank), plan.config.max_num_seqs)


def _load_model(plan: Plan, group: Group, device: torch.device, on_progress: Progress | None) -> Transformer:
    try:
        model = Transformer(plan.model, Placement(device, getattr(torch, plan.dtype), group, plan.in_float8()))
    except RuntimeError as exc:  # both allocators' out-of-memory errors are one
        reason = str(exc).splitlines()[0]
        raise ConfigError(f"{plan.config.model}: the weights do not fit on {device}: {reason}") from exc
    if plan.config.load_format == "dummy":
        fill_random(model.slots(), plan.config.seed)
    else:
        load_weights(plan.checkpoint, model.slots(), on_progress)
    return model


def _num_blocks(plan: Plan, group: Group, model: Model, attention: AttentionBackend) -> int:
    """How many blocks this rank's memory budget holds; at least one."""
    block_bytes = local_layout(plan.layout, group.world).block_bytes
    budget = plan.config.kv_cache_memory_bytes
    if budget is None and plan.device_type == "cuda":
        budget = _free_cuda_bytes(plan, group, model, attention)
    if budget is None:  # on the host, no more than all sequences at their longest could fill
        longest = -(-plan.max_model_len // plan.layout.block_size)
        budget = min(CPU_KV_BYTES, plan.config.max_num_seqs * longest * block_bytes)
    if budget < block_bytes:
        raise ConfigError(
            f"the KV cache gets {budget} bytes, one block of {plan.layout.block_size} tokens takes {block_bytes}: "
            "raise kv_cache_memory_bytes or gpu_memory_utilization"
        )
    return budget // block_bytes


def _free_cuda_bytes(plan: Plan, group: Group, model: Model, attention: AttentionBackend) -> int:
    """gpu_memory_utilization of the device, less what others use, less our peak in the largest step. May be < 0."""
    device = plan.device(group.rank)
    torch.cuda.reset_peak_memory_stats(device)
    _largest_step(plan, group, model, attention)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return int(total * plan.config.gpu_memory_utilization) - others - peak - SAMPLER_BYTES - GRAPH_BYTES


def _largest_step(plan: Plan, group: Group, model: Model, attention: AttentionBackend) -> None:
    """A full batch of as many sequences as may run, on a small cache that they share: only its memory matters."""
    tokens, size = plan.config.max_num_batched_tokens, plan.layout.block_size
    sequences = min(plan.config.max_num_seqs, tokens)
    lengths = [tokens // sequences + (index < tokens % sequences) for index in range(sequences)]
    blocks = list(range(-(-lengths[0] // size)))
    ends = [sum(lengths[: index + 1]) for index in range(sequences)]
    batch = Batch(
        token_ids=[0] * tokens,
        positions=[position for length in lengths for position in range(length)],
        query_start=[0, *ends],
        context_lens=lengths,
        block_tables=[blocks] * sequences,
        sample_rows=[end - 1 for end in ends],
    )
    cache = PagedKVCache(plan.layout, len(blocks), plan.device(group.rank), group.rank, group.world)
    ModelRunner(model, cache, attention).forward(pack(batch, size))
