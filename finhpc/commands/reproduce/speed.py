"""How large a model is on disk at some bits, and how fast it generates with a cache."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from finhpc.commands.export import export
from finhpc.generation.generator import Generator
from finhpc.generation.sampling import decode
from finhpc.models.files.weights import config_of
from finhpc.models.lora.peft_format import CONFIG as ADAPTER
from finhpc.models.lora.peft_format import QUANTIZED
from finhpc.quantization.fake import trained_bits
from finhpc.settings.export import ExportConfig, ExportQuantization
from finhpc.settings.generate import GenerateConfig, Sampling
from finhpc.settings.reproduce import MeasureConfig

WARM_UP = 2  # tokens


@dataclass
class Width:
    """A model at some bits: the folder it is exported to, its size there, and the seconds of generation per round."""

    model: str
    bits: int
    folder: Path
    size_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    def figures(self, new: int) -> dict[str, float]:
        return {"size_bytes": self.size_bytes, "generate_tokens_per_s": new / statistics.median(self.seconds)}


def own_bits(model: str) -> int:
    """The bits at which a model was trained; for an adapter, those of its base."""
    folder = Path(model)
    if (folder / ADAPTER).is_file():
        kept = folder / QUANTIZED
        return int(json.loads(kept.read_text(encoding="utf-8"))["bits"]) if kept.is_file() else 16
    return trained_bits(config_of(folder))


def measure_widths(config: MeasureConfig, scratch: Path, device: str) -> dict[str, dict[int, dict[str, float]]]:
    """Model -> bits -> `size_bytes`, and `generate_tokens_per_s` of one prompt; in turn, with one model in memory.

    Models are exported into `scratch`, in bfloat16, below 16 bits per vector (`minmax`), and adapters merged into
    their base. `device`: cpu or cuda. Raises `ConfigError` and `CheckpointError` as export and generate do.
    """
    widths = [
        _exported(Width(model, bits, scratch / f"{number}-{bits}"))
        for number, model in enumerate(config.model)
        for bits in dict.fromkeys([own_bits(model), *config.bits])
    ]
    for round_ in range(config.rounds):
        for width in widths if round_ % 2 == 0 else widths[::-1]:
            width.seconds.append(_seconds(width.folder, config, device))
    measured: dict[str, dict[int, dict[str, float]]] = {model: {} for model in config.model}
    for width in widths:
        measured[width.model][width.bits] = width.figures(config.new)
        shutil.rmtree(width.folder)
    return measured


def _exported(width: Width) -> Width:
    adapter = (Path(width.model) / ADAPTER).is_file()
    settings = ExportConfig(
        model=width.model,
        out=str(width.folder),
        format="merged" if adapter else "native",
        dtype="bfloat16",
        quantization=ExportQuantization(bits=width.bits),  # type: ignore[arg-type]
    )
    width.size_bytes = export(settings)["size_bytes"]
    return width


def _seconds(folder: Path, config: MeasureConfig, device: str) -> float:
    resources = config.resources.model_copy(update={"device": device})
    sampling = Sampling(max_new_tokens=config.new, stop_at_eos=False)
    generator = Generator(GenerateConfig(model=str(folder), dtype="bfloat16", sampling=sampling, resources=resources))
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, generator.model.config.vocab_size, (config.prompt,), generator=draw).tolist()
    for _ in decode(generator.decoder, [prompt], Sampling(max_new_tokens=WARM_UP)):
        pass
    begin = time.perf_counter()
    for _ in decode(generator.decoder, [prompt], sampling):
        pass
    return time.perf_counter() - begin
