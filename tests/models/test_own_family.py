"""A family from outside the package: trained, packed, decoded, saved and exported like finhpc's own.

It runs in a process of its own, because a registered family stays registered.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finhpc import ExportConfig, FinhpcError, export, load_model
from finhpc.generation.decoder import Decoder
from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.registry import FAMILIES, make_config, resolve_shape, skeleton
from finhpc.models.files.source import open_weights
from finhpc.models.initialize import random_fill
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.models.lora.model import LoraModel, LoraPipelineLayer
from finhpc.models.pipeline import PipelineLayer, estimated_costs, parts_of, stage_borders
from finhpc.settings.pretrain import Method, Model
from finhpc.settings.finetune import FinetuneQuantization, Lora
from tests.models import mixer
from tests.generation.folders import Passes
from tests.models.packs import examples, packs_of

AutoConfig.register("mixer", mixer.MixerConfig)
AutoModelForCausalLM.register(mixer.MixerConfig, mixer.MixerForCausalLM)
out, cpu = Path(sys.argv[1]), torch.device("cpu")
tokens = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
method = Method(kind=sys.argv[2], rank=4)
config = make_config(resolve_shape(Model(preset="mixer-nano")), ranks_of(method), method.kind)
model = initial_model(config, 0, method.init).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(4) if parameter.dim() == 2 else None
state = {name: parameter.detach() for name, parameter in model.named_parameters()}
expected = model(tokens).logits
loss = torch.nn.functional.cross_entropy(expected[:, :-1].reshape(-1, 300), tokens[:, 1:].reshape(-1))

# training: two stages of layers of the skeleton, the same first weights and the same loss
row, base = parts_of(config), skeleton(config)
assert 0 < stage_borders(row, estimated_costs(row, base, 12), 2)[1] < len(row)
layers = [PipelineLayer(part, base, cpu, random_fill(config, 0, method.init)) for part in row]
named = {name: parameter for layer in layers for name, parameter in layer.parameters_by_name()}
assert named.keys() == state.keys()
data = tokens
with torch.no_grad():
    for name, parameter in named.items():
        assert torch.equal(parameter * (4 if parameter.dim() == 2 else 1), state[name]), name
        parameter.copy_(state[name])
for layer in layers:
    data = layer(data)
torch.testing.assert_close(data, loss)
data.backward()
assert all(parameter.grad is not None for parameter in named.values())

# saved, opened again by finhpc and, after import finhpc, by transformers
save_model(out / "model", config, state.items(), None)
torch.testing.assert_close(load_model(out / "model")(tokens).logits, expected)

# finetuning: packs of examples that share a prefix give the mean loss of their answers
some = examples(4)
lora_model = LoraModel(open_weights(out / "model", low_rank=True), Lora(rank=2), FinetuneQuantization(bits=16))
assert len(lora_model.targets) == 8
data = packs_of(some, 4, 6)[0]
for part in lora_model.parts():
    data = LoraPipelineLayer(part, lora_model, cpu)(data)
total, count = 0.0, 0
for ids, answer in some:
    logits = model(torch.tensor([ids])).logits[0, -answer - 1 : -1]
    total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-answer:]), reduction="sum")
    count += answer
torch.testing.assert_close(data, total / count, rtol=1e-5, atol=1e-5)

# generation: cached keys and values, rows of different lengths
rows = [tokens[0].tolist(), tokens[1, 3:].tolist()]
passed = Passes(Decoder(model), 2, 12)
passed([row[:-1] for row in rows])
last = passed([row[-1:] for row in rows])
torch.testing.assert_close(last[0], expected[0, -1])
torch.testing.assert_close(last[1], model(tokens[1:, 3:]).logits[0, -1])

# export
export(ExportConfig(model=str(out / "model"), out=str(out / "packed"), quantization={"bits": 8}))
close = torch.cosine_similarity(load_model(out / "packed")(tokens).logits, expected, dim=-1)
assert close.min() > 0.98, close
export(ExportConfig(model=str(out / "model"), out=str(out / "merged"), format="merged"))
merged = load_model(out / "merged")
assert type(merged) is mixer.MixerForCausalLM
torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_a_family_of_a_plugin_does_what_finhpcs_own_do(tmp_path: Path, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), kind], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
