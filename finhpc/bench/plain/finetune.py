"""The finetuning loops with which finhpc is compared: transformers and peft, with and without transformers' Trainer.

Both pad the examples of a batch on the right; AdamW has a constant rate, no decay and no clipping. The base is bfloat16
or quantized by bitsandbytes; peft keeps the adapters in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finhpc.data.examples.examples import Arrays
from finhpc.models.packing.layout import IGNORED


class Pass(NamedTuple):
    """Seconds of all steps but the first, which warms up; the loss of every step, in nats."""

    seconds: float
    losses: list[float]


CPU = torch.device("cpu")
Passes = Callable[[Sequence[Sequence[int]]], Pass]  # batches of examples' ids -> a pass over them


def peft_model(path: Path, bits: int, rank: int, seed: int, device: torch.device = CPU, dora: bool = False) -> Any:
    """The base of a folder with an adapter on every linear layer except the head, as the loops train it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    how: dict[str, Any] = {"dtype": torch.bfloat16, "quantization_config": bitsandbytes_config(bits)}
    base = AutoModelForCausalLM.from_pretrained(path, **how, device_map=None if device == CPU else device)
    return with_adapters(base, rank, dora)


def bitsandbytes_config(bits: int) -> Any:
    """How transformers quantizes a base to 8 or 4 bits; None at 16."""
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    how: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return BitsAndBytesConfig(load_in_4bit=True, **how) if bits == 4 else None


def with_adapters(base: Any, rank: int, dora: bool = False) -> Any:
    """peft's model: an adapter on every linear layer except the head."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(base, LoraConfig(r=rank, use_dora=dora, **settings))


def random_base(hf_config: Any, bits: int, device: torch.device) -> Any:
    """The base of a config with random weights on `device`, quantized as `from_pretrained` does."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with device:
        base: Any = AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16)
    if (how := bitsandbytes_config(bits)) is not None:
        base = replace_with_bnb_linear(base, ["lm_head"], quantization_config=how)
        base.is_loaded_in_8bit, base.is_loaded_in_4bit = bits == 8, bits == 4
        for module in base.modules():
            if type(module).__module__.startswith("bitsandbytes"):
                weight = module.weight
                values = torch.empty(weight.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
                module.weight = type(weight)(values, requires_grad=False, **weight.__dict__).to(device)
    return base


def adapters(model: Any) -> dict[str, Tensor]:
    """finhpc's name of each of the adapters' parameters -> it."""
    factors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            factors[f"{layer}.{rest.partition('_vector')[0].partition('.')[0]}"] = parameter
    return factors


def padded(examples: list[tuple[Any, Any]], pad: int) -> dict[str, Tensor]:
    """A batch (examples, longest) of (tokens, which are the answer's); labels are the answers alone."""
    shape = (len(examples), max(len(tokens) for tokens, _ in examples))
    batch = {
        "input_ids": torch.full(shape, pad, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
    }
    for row, (tokens, answer) in enumerate(examples):
        ids = torch.from_numpy(tokens).long()
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = ids.where(torch.from_numpy(answer), IGNORED)
    return batch


def plain_step(model: Any, lr: float, forward: Any = None) -> Callable[[Sequence[dict[str, Tensor]]], float]:
    """Whole steps over micro-batches, with an optimizer of their own; they return the loss in nats.

    `forward`: the compiled model, if it is.
    """
    forward = model if forward is None else forward  # a compiled peft model has no truth value
    model.eval()  # as transformers loads it: nothing in it drops out
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)

    def step(batches: Sequence[dict[str, Tensor]]) -> float:
        losses = []
        for batch in batches:
            loss = forward(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
            if len(batches) > 1:
                loss = loss / len(batches)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return float(sum(losses).item())  # type: ignore[union-attr]

    return step


def plain_passes(model: Any, arrays: Arrays, pad: int, lr: float, forward: Any = None) -> Passes:
    """Passes of the loop that peft's documentation shows, over `forward` if the model is compiled."""

    def run(batches: Sequence[Sequence[int]]) -> Pass:
        step = plain_step(model, lr, forward)
        losses: list[float] = []
        start = time.perf_counter()
        for batch in batches:
            if len(losses) == 1:
                start = time.perf_counter()
            losses.append(step([padded([arrays.example(i) for i in batch], pad)]))
        return Pass(time.perf_counter() - start, losses)

    return run


def trainer_passes(model: Any, arrays: Arrays, pad: int, lr: float, folder: Path) -> Passes:
    """Passes of transformers' Trainer; `folder`: where it may write."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return self.train_dataset

    class Clock(TrainerCallback):  # type: ignore[misc]
        start = 0.0
        steps = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps += 1
            if self.steps == 1:
                self.start = time.perf_counter()

    def run(batches: Sequence[Sequence[int]]) -> Pass:
        how: dict[str, Any] = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0}
        arguments = TrainingArguments(
            str(folder), learning_rate=lr, num_train_epochs=1, per_device_train_batch_size=len(batches[0]),
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, **how,
        )  # fmt: skip
        made: Any = torch.utils.data.DataLoader(
            [[arrays.example(i) for i in batch] for batch in batches],  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=lambda examples: padded(examples, pad),
        )
        clock = Clock()
        trainer = InOrder(model, arguments, train_dataset=made, callbacks=[clock])
        trainer.train()
        seconds = time.perf_counter() - clock.start
        return Pass(seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    return run
