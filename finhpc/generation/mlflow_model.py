"""A model that was logged to MLflow, as MLflow opens it (`finhpc.tracking.pyfunc` logs it and names this module)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finhpc.models.files.tokenizer import open_tokenizer
from finhpc.models.files.tokens import prompt_ids, stop_ids
from finhpc.models.loading import load_model


class TextGenerator:
    """Continues prompts with greedy decoding."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    def predict(self, model_input: Any, params: dict[str, Any]) -> list[str]:
        """Return each prompt with its continuation of `max_new_tokens` tokens; MLflow adds the default."""
        return [self._continue(prompt, int(params["max_new_tokens"])) for prompt in _prompts(model_input)]

    def _continue(self, prompt: str, new_tokens: int) -> str:
        ids = torch.tensor([prompt_ids(self.tokenizer, prompt)])
        stop = stop_ids(self.tokenizer, self.model.generation_config)
        with torch.inference_mode():
            out = self.model.generate(
                ids.to(self.model.device),
                attention_mask=torch.ones_like(ids).to(self.model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=stop or None,
                pad_token_id=stop[0] if stop else 0,
            )
        return str(self.tokenizer.decode(out[0], skip_special_tokens=True))


def _load_pyfunc(path: str) -> TextGenerator:
    """Open the model's folder; MLflow calls this."""
    return TextGenerator(load_model(path), open_tokenizer(Path(path)))


def _prompts(model_input: Any) -> Iterable[str]:
    """Return the texts in a string, a list, an array, a series or the first column of a table."""
    if isinstance(model_input, str):
        return [model_input]
    if hasattr(model_input, "iloc"):
        model_input = model_input if model_input.ndim == 1 else model_input.iloc[:, 0]
    return [str(prompt) for prompt in model_input]
