"""A model of Llama-2-7B's shapes whose weights take no disk, and what this process needs to work with it.

`python -m tests.models.seven_billion WORK FOLDER` does one piece of work of a driver or a worker through the real paths
and prints its peak memory as JSON: `peak_bytes` resident above what the imported libraries take, and what it made.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finhpc.commands.finetune import Finetune
from finhpc.models.families.registry import skeleton
from finhpc.models.files.config import read_config
from finhpc.models.files.source import open_weights
from finhpc.models.folder import save_model
from finhpc.models.initialize import weights_fill
from finhpc.models.lora.model import LoraModel
from finhpc.models.pipeline import PipelineLayer, parts_of
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig
from finhpc.training.checkpoint import Checkpoint
from finhpc.training.memory import peak_resident_bytes, reset_peaks
from tests.models.dense import saved, tiny_llama
from tests.tiny import with_tokenizer

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
BLOCK = 4 * 4096**2 + 3 * 4096 * 11008  # parameters of the matrices of a block
LARGEST = 4096 * 11008  # of its largest matrix
FILES = 3
STATE = ("param", "exp_avg", "exp_avg_sq")
STAGE = range(1, 5)  # parts of the stage that is measured: two blocks, in halves


def sparse_llama(folder: Path) -> Path:
    """Write the folder of a 7B model in bfloat16; its safetensors files are holes after their headers, so zeros."""
    with_tokenizer(saved(tiny_llama(tied=False, context=256), folder))
    config = json.loads((folder / "config.json").read_text()) | SHAPE | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    shapes = {name: list(p.shape) for name, p in skeleton(read_config(folder)).named_parameters()}
    names, index = list(shapes), {}
    for i in range(FILES):
        file = f"model-{i + 1:05d}-of-{FILES:05d}.safetensors"
        mine = names[i * len(names) // FILES : (i + 1) * len(names) // FILES]
        write_holes(folder / file, {name: shapes[name] for name in mine}, "BF16", 2)
        index |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def write_holes(file: Path, shapes: dict[str, list[int]], dtype: str, size: int) -> None:
    """Write a safetensors file of zeros: its header, and a hole in place of the tensors."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + size * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + at)


def plan(folder: Path) -> Any:
    """The driver of a finetuning: settings, examples, fingerprint of the base, counts."""
    job = Finetune(config(folder))
    assert job.fingerprints
    assert job.counts()["params_total"] > 0
    return job


def quantize(folder: Path) -> Any:
    """A worker of a finetuning at 4 bits: its stage of the frozen base, with adapters."""
    settings = config(folder)
    lora_model = LoraModel.of(settings, open_weights(folder))
    parts = [lora_model.parts()[i] for i in STAGE]
    return [lora_model.layer_class(part, lora_model, torch.device("cpu")) for part in parts]


def start(folder: Path) -> Any:
    """A worker of a pretraining that starts from the model: its stage, in float32."""
    weights = open_weights(folder)
    fill, model = weights_fill(weights), open_weights(folder).skeleton
    parts = [parts_of(weights.config)[i] for i in STAGE]
    return [PipelineLayer(part, model, torch.device("cpu"), fill) for part in parts]


def save(folder: Path) -> Any:
    """The driver after a pretraining: the model's folder from a checkpoint, here of two blocks."""
    out = folder.with_name("saved")
    save_model(out, read_config(folder), checkpoint(folder, range(2)).tensors("param"), None)
    shutil.rmtree(out)


def resume(folder: Path) -> Any:
    """A worker that resumes: weights and moments of its stage, here of one block."""
    shapes = block_shapes(folder, range(1))
    stored = checkpoint(folder, range(1))
    state = {prefix: {name: torch.empty(shape) for name, shape in shapes.items()} for prefix in STATE}
    for prefix, tensors in state.items():
        stored.read_into(prefix, {name: (tensor, 0) for name, tensor in tensors.items()})
    return [tensor for tensors in state.values() for tensor in tensors.values()]


def checkpoint(folder: Path, blocks: range) -> Checkpoint:
    """A checkpoint of some blocks in float32, whose file is a hole."""
    path = folder.with_name(f"{folder.name}-step")
    path.mkdir(exist_ok=True)
    shapes = {f"{prefix}.{name}": shape for prefix in STATE for name, shape in block_shapes(folder, blocks).items()}
    write_holes(path / "stage-0.safetensors", shapes, "F32", 4)
    return Checkpoint(path, {"files": {"stage-0.safetensors": {}}})


def block_shapes(folder: Path, blocks: range) -> dict[str, list[int]]:
    layers = tuple(f"model.layers.{i}." for i in blocks)
    named = skeleton(read_config(folder)).named_parameters()
    return {name: list(p.shape) for name, p in named if name.startswith(layers)}


def config(folder: Path) -> FinetuneConfig:
    source = folder.parent / "news.txt"
    source.write_text("".join(f"Profit rose {i} .@{label}\n" for i in range(20) for label in ("positive", "negative")))
    tree: dict[str, Any] = {
        "model": {"path": str(folder)},
        "lora": {"rank": 16},
        "quantization": {"bits": 4},
        "data": {"source": [str(source)], "max_len": 200},
        "train": {"precision": "bf16"},
        "run": {"name": "run", "storage": str(folder.parent)},
    }
    return build(FinetuneConfig, tree)


WORK: dict[str, Callable[[Path], Any]] = {work.__name__: work for work in (plan, quantize, start, save, resume)}


def kept_bytes(made: Any) -> int:
    """The bytes of tensors, or of those of layers."""
    tensors: list[torch.Tensor] = []
    for thing in made if isinstance(made, list) else []:
        tensors += [thing] if isinstance(thing, torch.Tensor) else [*thing.parameters(), *thing.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


if __name__ == "__main__":
    work, folder = WORK[sys.argv[1]], Path(sys.argv[2])
    torch.set_num_threads(1)
    work(folder.with_name("tiny"))  # imports what it needs
    reset_peaks(torch.device("cpu"))
    before = peak_resident_bytes()
    made = work(folder)
    peak = peak_resident_bytes()
    print(json.dumps({"peak_bytes": peak - before, "process_bytes": peak, "kept_bytes": kept_bytes(made)}))
