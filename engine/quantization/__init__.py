"""Weights in few bits: made at load (`grouped.quantize`), or read as others have published them (`create_reader`)."""

from __future__ import annotations

from tandem.engine.checkpoint import CONFIG, Checkpoint
from tandem.engine.models.registry import Fields
from tandem.engine.quantization.awq import AwqReader
from tandem.engine.quantization.compressed_tensors import CompressedTensorsReader
from tandem.engine.quantization.fp8 import Fp8Reader
from tandem.engine.quantization.gptq import GptqReader
from tandem.engine.quantization.reader import WeightReader, choice

METHODS: dict[str, type[WeightReader]] = {
    "awq": AwqReader,
    "compressed-tensors": CompressedTensorsReader,
    "fp8": Fp8Reader,
    "gptq": GptqReader,
}


def create_reader(checkpoint: Checkpoint) -> WeightReader:
    """The reader of what config.json says the weights are. Raises ModelError for what none can read."""
    fields = Fields(checkpoint.config, checkpoint.directory / CONFIG)
    key = "quantization_config" if fields.has("quantization_config") else "compression_config"  # the latter before 2025
    if not fields.has(key):
        return WeightReader(checkpoint, fields)
    section = fields.section(key)
    method = section.text("quant_method", "missing").lower()
    return METHODS[choice(section, "quant_method", method, METHODS)](checkpoint, section)
