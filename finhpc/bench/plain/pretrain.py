"""The plain torch loops with which finhpc is compared: no pipeline engine, no Ray, no tracking."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from finhpc.lowrank.blend import blend_in, set_alpha
from finhpc.lowrank.registry import BLEND
from finhpc.lowrank.sltrain import set_supports
from finhpc.models.families.registry import skeleton
from finhpc.models.initialize import initial_model
from finhpc.models.pipeline import parts_of
from finhpc.quantization.fake import StraightThrough, is_transposed, matrices
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.optimizers.stage import make_optimizer, set_lr

Step = Callable[[Tensor, float], float]  # (tokens (batch, seq), learning rate) -> loss in nats


class Pair(nn.Module):
    """y = B(A x) + b from two of torch's linear layers."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x))  # type: ignore[no-any-return]


def transformers_step(config: PretrainConfig, hf_config: Any, rank: int, device: torch.device) -> Step:
    """Whole steps of transformers' own GPT-2, as it comes; with `rank`, every linear layer replaced by a `Pair`.

    With `train.compile=on` the model and its loss are one compiled graph.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    keys = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
    sizes = {key: getattr(hf_config, key) for key in keys}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with device:
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=None, eos_token_id=None))
        model.config.use_cache = False
        if rank:
            _to_pairs(model.transformer, rank)
            model.lm_head = Pair(hf_config.n_embd, hf_config.vocab_size, rank)

    def loss(tokens: Tensor) -> Tensor:
        return model(tokens, labels=tokens).loss  # type: ignore[no-any-return]

    return _step(config, model, torch.compile(loss, dynamic=False) if config.train.compile == "on" else loss, device)


def model_step(config: PretrainConfig, hf_config: Any, device: torch.device) -> tuple[nn.Module, Step]:
    """The model that `config` trains, uninitialized on `device`, and whole steps of transformers' own forward pass."""
    model: Any = skeleton(hf_config)
    if config.method.kind == BLEND:
        blend_in(model, trainable=config.method.blend_weight == "trainable")
        set_alpha(model.modules(), config.method.blend_start)
    model = model.to_empty(device=device).train()
    set_supports(model)
    model.config._attn_implementation, model.config.use_cache = "sdpa", False  # torch's own attention, not ours
    if config.quantization.training_bits < 16:
        for module in list(model.modules()):
            for name in matrices(module):
                rounded = _Rounded(config.quantization.training_bits, is_transposed(module))
                parametrize.register_parametrization(module, name, rounded, unsafe=True)
    return model, _step(config, model, lambda tokens: model(tokens, labels=tokens).loss, device)


class _Rounded(nn.Module):
    """Rounds a weight on each use; the gradient passes straight through."""

    def __init__(self, bits: int, transposed: bool) -> None:
        super().__init__()
        self.how = bits, transposed

    def forward(self, weight: Tensor) -> Tensor:
        return StraightThrough.apply(weight, *self.how)  # type: ignore[no-untyped-call, no-any-return]


def parts_step(config: PretrainConfig, hf_config: Any, device: torch.device) -> Step:
    """Whole steps of finhpc's own parts, one after the other, in torch alone."""
    model = initial_model(hf_config, config.train.seed, config.method.init).to(device)
    row = [(part, part.modules(model)) for part in parts_of(hf_config)]

    def loss(tokens: Tensor) -> Tensor:
        data: Any = tokens
        for part, modules in row:
            data = part.run(data, *modules)
        return data  # type: ignore[no-any-return]

    return _step(config, model, loss, device)


def _step(config: PretrainConfig, model: nn.Module, loss_of: Callable[[Tensor], Tensor], device: torch.device) -> Step:
    named = dict(model.named_parameters())
    optimizer = make_optimizer(named, config.optimizer)
    parameters = list(named.values())
    bf16 = config.train.precision != "fp32"

    def step(tokens: Tensor, lr: float) -> float:
        set_lr(optimizer, lr)
        losses = []
        for part in tokens.split(tokens.shape[0] // config.parallel.micro_batches):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                loss = loss_of(part.to(device))
            if config.parallel.micro_batches > 1:
                loss = loss / config.parallel.micro_batches
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        if config.optimizer.grad_clip:
            nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(sum(losses).item())  # type: ignore[union-attr]

    return step


def _to_pairs(module: nn.Module, rank: int) -> None:
    for name, child in list(module.named_children()):
        if type(child).__name__ == "Conv1D":
            in_features, out_features = child.weight.shape  # type: ignore[union-attr, misc]
            setattr(module, name, Pair(in_features, out_features, rank))
        else:
            _to_pairs(child, rank)


def run_plain(config: PretrainConfig) -> list[dict[str, float]]:
    """The run of `config` (one stage, one replica) as a plain loop over the same batches; one record per step."""
    from finhpc.data.shards.reader import ReplicaStream, local_stream
    from finhpc.data.shards.shards import Shards
    from finhpc.planning.plan import hf_config_of
    from finhpc.training.allocator import keep_freed_memory
    from finhpc.training.optimizers.schedules import learning_rate

    cuda = config.resources.device == "cuda"
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        keep_freed_memory()
    torch.set_num_threads(config.resources.threads)
    shards = Shards.open(str(config.data.shards))
    parallel, steps = config.parallel, config.train.steps
    per_step = parallel.samples_per_step
    stream = ReplicaStream(shards, config.data.seq_len, config.train.seed, 0, steps, per_step, per_step)
    batches: Iterator[Any] = local_stream(stream)
    step = parts_step(config, hf_config_of(config, shards), device)
    records = []
    for i in range(1, steps + 1):
        tokens = torch.from_numpy(next(batches)["tokens"])
        loss = step(tokens, learning_rate(config.optimizer, i, steps))
        records.append({"step": i, "train_loss": loss, "time": time.time()})
    return records


if __name__ == "__main__":  # one JSON list on stdout: python -m finhpc.bench.plain.pretrain CONFIG.yaml
    import json
    import sys

    from finhpc.settings.base import load

    print(json.dumps(run_plain(load(PretrainConfig, sys.argv[1]))))
