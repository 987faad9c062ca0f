"""Everything there is to measure on a GPU, by one command, in ten minutes:

    python benchmarks/gpu.py --save DIRECTORY           writes gpu.json and gpu.md there, after each part

Parts run one behind the other, each in a process of its own with a share of the time, so none can take the others
along. What a device can do is measured first: bytes by the better of a copy and a sum, products by one of 8192³. The
model has Llama-3.1-8B's shape in bfloat16 and random weights; a step is Engine.forward, with sampling and host work.
Where the device computes in FP8, the same again with weights and KV cache in it.
Exit code 2 without a GPU, 1 if a part failed. (Not called cuda.py: torch would import that for NVIDIA's `cuda`.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402

from tandem.common.request import Leg, SamplingParams  # noqa: E402
from tandem.engine import rank  # noqa: E402
from tandem.engine.batch import Scheduled  # noqa: E402
from tandem.engine.config import EngineConfig  # noqa: E402
from tandem.engine.engine import Engine  # noqa: E402
from tandem.engine.models.layers import Slot  # noqa: E402
from tandem.engine.quantization import float8  # noqa: E402
from tandem.engine.sequence import Sequence  # noqa: E402

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
SECONDS = {  # at most, and in order
    "device": 40, "engine": 240, "fp8": 180, "transformers": 140, "connectors": 120, "tests": 240,
}  # fmt: skip
Figures = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What the engine part measures; small ones try it out without a GPU."""

    config: Figures
    device: str = "cuda"
    decodes: tuple[tuple[int, int], ...] = ((1, 128), (1, 2048), (16, 2048), (64, 2048))  # sequences, context
    prefill: int = 8192
    requests: int = 64
    prompt: int = 512
    output: int = 128
    kv_bytes: int = 22 << 30
    steps: int = 30
    float8: bool = False  # weights and KV cache


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(action: Callable[[], object], rounds: int, warm: int = 3) -> float:
    """Median of one `action`, until the device has done it."""
    taken = list[float]()
    for index in range(warm + rounds):
        synchronize()
        started = time.perf_counter()
        action()
        synchronize()
        if index >= warm:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


# ------------------------------------------------------------------------------------------------------------ device


def device_part() -> Figures:
    words = torch.empty(4 << 27, dtype=torch.int64, device="cuda").random_()
    copied = torch.empty_like(words)
    copy = 2 * words.nbytes / seconds(lambda: copied.copy_(words), 10)
    read = words.nbytes / seconds(words.sum, 10)
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    matrix = 2 * 8192**3 / seconds(lambda: left @ right, 20)
    narrow = float("nan")
    if float8.has_float8(left.device):
        codes, scales = float8.quantize(left)
        weight = float8.Float8Weight(codes, scales)
        narrow = 2 * 8192**3 / seconds(lambda: weight.product(right, None), 20)  # with the rounding of `right`
    return {
        "FP8 matrix TFLOP/s": narrow / 1e12,
        "name": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "copy GB/s": copy / 1e9, "read GB/s": read / 1e9, "matrix TFLOP/s": matrix / 1e12,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ engine


def fill_on_device(slots: Iterable[Slot], seed: int) -> None:
    """As `fill_random`, which draws on the host and takes a minute for so many weights."""
    for slot in slots:
        if slot.name.endswith("norm.weight"):
            slot.target.fill_(1.0)
        else:
            limit = (3.0 / slot.shape[-1]) ** 0.5
            shape = list(slot.shape)
            shape[slot.axis] = slot.size
            slot.put(torch.empty(shape, device="cuda" if torch.cuda.is_available() else "cpu").uniform_(-limit, limit))


class Workload:
    """One engine, and sequences on blocks of their own."""

    def __init__(self, directory: Path, setting: Setting) -> None:
        self.setting = setting
        fp8: Figures = {"quantization": "fp8", "kv_cache_dtype": "fp8"} if setting.float8 else {}
        config = EngineConfig(
            model=str(directory), load_format="dummy", device=setting.device, dtype="bfloat16", **fp8,
            kv_cache_memory_bytes=setting.kv_bytes, max_num_batched_tokens=setting.prefill,
            max_num_seqs=max(setting.requests, *(count for count, _ in setting.decodes)),
        )  # fmt: skip
        rank.fill_random = fill_on_device
        self.engine = Engine.load(config)
        self.runner: Any = self.engine._rank.runner
        for layer in self.engine._rank.cache.layers:
            layer.copy_(torch.randn(layer.shape, dtype=torch.bfloat16, device=layer.device))

    def sequences(self, count: int, length: int, room: int = 0) -> list[Sequence]:
        """Of `length` tokens each, and blocks for `room` more."""
        blocks = -(-(length + room) // self.engine.layout.block_size)
        made = list[Sequence]()
        for index in range(count):
            prompt = tuple(torch.randint(0, self.engine.vocab_size, (length,)).tolist())
            leg = Leg(str(index), 0, prompt, SamplingParams(max_tokens=max(1, room), temperature=0.0))
            item = Sequence.from_leg(leg, 0.0)
            item.blocks = list(range(index * blocks, (index + 1) * blocks))
            made.append(item)
        assert count * blocks <= self.engine.num_blocks, "kv_bytes is too small"
        return made

    def decode(self, count: int, context: int) -> Figures:
        """A step of `count` sequences, by graphs and launch by launch, in turn: median of three rounds each."""
        items = self.sequences(count, context)
        for item in items:
            item.computed = context - 1
        scheduled = [Scheduled(item, 1) for item in items]
        by_graph, eager = list[float](), list[float]()
        for _ in range(3):
            by_graph.append(seconds(lambda: self.engine.forward(scheduled), self.setting.steps))
            self.runner.forward = self.runner.eager
            eager.append(seconds(lambda: self.engine.forward(scheduled), self.setting.steps // 3))
            del self.runner.forward
        moved = self.weight_bytes() + count * context * self.kv_bytes()
        return {
            "sequences": count, "context": context, "ms": statistics.median(by_graph) * 1e3,
            "eager ms": statistics.median(eager) * 1e3, "spread": max(by_graph) / min(by_graph), "bytes": moved,
        }  # fmt: skip

    def prefill(self) -> Figures:
        (item,) = self.sequences(1, self.setting.prefill)
        scheduled = [Scheduled(item, self.setting.prefill)]
        taken = seconds(lambda: self.engine.forward(scheduled), 5)
        return {"tokens": self.setting.prefill, "ms": taken * 1e3, "flop": self.flop(self.setting.prefill)}

    def serve(self) -> Figures:
        """All requests at once: prompts in whole chunks as they fit a step, beside decodes."""
        waiting = self.sequences(self.setting.requests, self.setting.prompt, self.setting.output)
        running, produced = list[Sequence](), 0
        synchronize()
        started = time.perf_counter()
        while waiting or running:
            scheduled = [Scheduled(item, 1) for item in running]
            room = self.setting.prefill - len(scheduled)
            while waiting and room >= self.setting.prompt:
                running.append(waiting.pop(0))
                scheduled.append(Scheduled(running[-1], self.setting.prompt))
                room -= self.setting.prompt
            for result, item in zip(self.engine.forward(scheduled), scheduled, strict=True):
                item.sequence.computed += item.num_tokens
                item.sequence.token_ids.extend(result.token_ids)
                produced += len(result.token_ids)
            running = [item for item in running if item.output_len < self.setting.output]
        return {"tokens": produced, "tokens/s": produced / (time.perf_counter() - started)}

    def weight_bytes(self) -> int:
        """That a decode step reads: all but the embedding, of which it reads a few rows."""
        head = self.setting.config["vocab_size"] * self.setting.config["hidden_size"]
        return (1 if self.setting.float8 else 2) * self.layer_weights() + 2 * head

    def layer_weights(self) -> int:
        config = self.setting.config
        hidden, size = config["hidden_size"], config["head_dim"]
        qkv = hidden * size * (config["num_attention_heads"] + 2 * config["num_key_value_heads"])
        output = hidden * size * config["num_attention_heads"]
        return int(config["num_hidden_layers"] * (qkv + output + 3 * hidden * config["intermediate_size"]))

    def kv_bytes(self) -> int:
        return self.engine.layout.block_bytes // self.engine.layout.block_size

    def flop(self, tokens: int) -> int:
        """Products of the layers, and the half of attention's that is not masked."""
        config = self.setting.config
        width = config["num_attention_heads"] * config["head_dim"]
        return 2 * tokens * self.layer_weights() + 2 * tokens * tokens * width * config["num_hidden_layers"]


def fp8_part(directory: Path, setting: Setting) -> Figures:
    if setting.device == "cuda" and not float8.has_float8(torch.device("cuda")):
        return {}
    return engine_part(directory, replace(setting, float8=True))


def engine_part(directory: Path, setting: Setting) -> Figures:
    started = time.perf_counter()
    work = Workload(directory, setting)
    figures: Figures = {"load s": time.perf_counter() - started}
    figures["decode"] = [work.decode(*shape) for shape in setting.decodes]
    graphs = work.runner._graphs
    figures["graphs"] = bool(graphs and graphs.cover(1))  # not where capturing failed
    figures["prefill"] = work.prefill()
    work.serve()  # compiles and captures
    figures["serve"] = work.serve()
    work.engine.close()
    return figures


# ------------------------------------------------------------------------------------------------------------ others


def transformers_part(directory: Path, setting: Setting) -> Figures:
    """The same requests by continuous batching; the better of two rounds, the first of which warms up."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    config._attn_implementation = "sdpa"
    with torch.device(setting.device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    generation = transformers.GenerationConfig(max_new_tokens=setting.output, do_sample=False, eos_token_id=-1)
    prompts = [torch.randint(0, config.vocab_size, (setting.prompt,)).tolist() for _ in range(setting.requests)]
    rates = list[float]()
    for _ in range(2):
        started = time.perf_counter()
        results = model.generate_batch(inputs=prompts, generation_config=generation)
        rates.append(sum(len(item.generated_tokens) for item in results.values()) / (time.perf_counter() - started))
    return {"version": transformers.__version__, "tokens/s": max(rates)}


def connectors_part() -> Figures:
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.json"
        command = [sys.executable, str(ROOT / "benchmarks/transfer.py"), "--device", "cuda", "--rounds", "3"]
        command += ["--connectors", "cuda_ipc,nixl,tcp", "--mib", "256,1024", "--blocks", "llama-3.1-8b"]
        done = subprocess.run([*command, "--save", str(rows)], capture_output=True, text=True, timeout=110)
        if done.returncode or not rows.exists():
            raise RuntimeError(f"transfer.py: {done.stderr[-2000:]}")
        return {"rows": json.loads(rows.read_text()), "notes": done.stderr[-500:]}


def tests_part() -> Figures:
    """The kernels' tests and all that are marked gpu, without this project's pytest plugins."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(ROOT)]
    pytest += ["-o", "pythonpath=.", "--import-mode=importlib", "-p", "no:cacheprovider"]
    files = [f"tests/engine/test_{name}.py" for name in ("attention", "fused", "graphs", "float8")]
    runs = {"kernels": files, "gpu": ["-m", "gpu", "tests/kv_transfer/test_connectors.py"]}
    figures: Figures = {}
    for name, arguments in runs.items():
        done = subprocess.run([*pytest, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200)
        figures[name] = {"code": done.returncode, "last": done.stdout.strip().splitlines()[-1:]}
        if done.returncode:
            figures[name]["output"] = done.stdout[-6000:] + done.stderr[-2000:]
            figures["error"] = f"{name} tests failed"
    return figures


# ------------------------------------------------------------------------------------------------------------ report


def table(results: Figures) -> str:
    """Markdown: what was measured, as a share of what the device can do, and the target."""
    rows = [("measure", "figure", "share", "target")]
    device, engine = results.get("device", {}), results.get("engine", {})
    for name in ("copy GB/s", "read GB/s", "matrix TFLOP/s", "FP8 matrix TFLOP/s"):
        rows.append((name, f"{device.get(name, float('nan')):.0f}", "", ""))
    targets = {(1, 128): "≥ 85 %", (64, 2048): "≥ 70 %", "prefill": "≥ 60 %"}
    rows += step_rows("", engine, device, targets)
    rows += step_rows("FP8 ", results.get("fp8", {}), device, {})
    if serve := engine.get("serve"):
        peer = results.get("transformers", {}).get("tokens/s", float("nan"))
        figure = f"{serve['tokens/s']:.0f} tokens/s (transformers {peer:.0f})"
        rows.append(("64 requests, 512 in, 128 out", figure, f"{serve['tokens/s'] / peer:.1f} ×", "≥ 3 ×"))
    for row in results.get("connectors", {}).get("rows", []):
        what = f"{row['connector']}, {row['mib']} MiB: link, connector"
        shares = f"{row['link_to_copy']:.0%}, {row['raw_to_copy']:.0%}"
        rows.append((what, f"{row['link']:.1f}, {row['raw']:.1f} GB/s", shares, "≥ 80 %"))
    for name, result in results.get("tests", {}).items():
        if isinstance(result, dict):
            rows.append((f"tests: {name}", " ".join(result["last"]), "", "all pass"))
    rows.insert(1, ("---", "---", "---", "---"))
    failed = [f"{name} failed: {part['error'].splitlines()[-1]}" for name, part in results.items() if "error" in part]
    head = f"{device.get('name', 'unknown device')}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return "\n".join([head, "", *(f"| {' | '.join(row)} |" for row in rows), "", *failed]) + "\n"


def step_rows(kind: str, engine: Figures, device: Figures, targets: dict[Any, str]) -> list[tuple[str, str, str, str]]:
    """Of the part `engine`, whose products are of `kind`."""
    bandwidth = max(device.get("copy GB/s", 0), device.get("read GB/s", 0)) * 1e9 or float("nan")
    rows = list[tuple[str, str, str, str]]()
    for row in engine.get("decode", []):
        share = row["bytes"] / (row["ms"] / 1e3) / bandwidth
        what = f"{kind}decode, {row['sequences']} × {row['context']} tokens"
        figure = (
            f"{row['ms']:.2f} ms {'by graph' if engine['graphs'] else 'WITHOUT graphs'} (eager {row['eager ms']:.2f})"
        )
        rows.append((what, figure, f"{share:.0%}", targets.get((row["sequences"], row["context"]), "")))
    if prefill := engine.get("prefill"):
        share = prefill["flop"] / (prefill["ms"] / 1e3) / (device.get(f"{kind}matrix TFLOP/s", float("nan")) * 1e12)
        what, figure = f"{kind}prefill, {prefill['tokens']} tokens", f"{prefill['ms']:.1f} ms"
        rows.append((what, figure, f"{share:.0%}", targets.get("prefill", "")))
    return rows


def run_part(name: str, directory: Path, limit: float) -> Figures:
    """The part's figures, or {"error": …}."""
    target = directory / f"{name}.json"
    command = [sys.executable, __file__, "--part", name, "--model", str(directory), "--into", str(target)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as exc:
        return {"error": f"took more than {limit:.0f} s", "stderr": str(exc.stderr)[-3000:]}
    if done.returncode or not target.exists():
        return {"error": done.stderr[-4000:] or f"exit code {done.returncode}"}
    return json.loads(target.read_text())


def run_all(names: list[str], save: Path, limit: float) -> int:
    deadline, results = time.monotonic() + limit, Figures()
    save.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tandem-gpu-") as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(LLAMA_8B))
        for name in names:
            left = deadline - time.monotonic()
            print(f"{name} …", flush=True)
            results[name] = (
                run_part(name, Path(scratch), min(left, SECONDS[name])) if left > 5 else {"error": "no time"}
            )
            (save / "gpu.json").write_text(json.dumps(results, indent=1))
            (save / "gpu.md").write_text(table(results))
    print(table(results))
    return 1 if any("error" in part for part in results.values()) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(SECONDS), help="default: all")
    parser.add_argument("--save", type=Path, default=Path("gpu-results"), help="directory for gpu.json and gpu.md")
    parser.add_argument("--limit", type=float, default=580, help="seconds for everything")
    for hidden in ("--part", "--model", "--into"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device here, nothing to measure", file=sys.stderr)
        return 2
    if not arguments.part:
        return run_all(arguments.parts.split(","), arguments.save, arguments.limit)
    model, setting = Path(arguments.model), Setting(LLAMA_8B)
    parts: dict[str, Callable[[], Figures]] = {
        "device": device_part,
        "engine": lambda: engine_part(model, setting),
        "fp8": lambda: fp8_part(model, setting),
        "transformers": lambda: transformers_part(model, setting),
        "connectors": connectors_part,
        "tests": tests_part,
    }
    Path(arguments.into).write_text(json.dumps(parts[arguments.part]()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
