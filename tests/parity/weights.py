"""Logits, losses and greedy text: families, bases, adapters, tokenizers and export formats through every command.

The reference is transformers' own model with the weights that the base stands for, in float32, under peft's reading
of the adapter. A command agrees with it within `TOLERANCES`, or it refuses the adapter by name, and then all do.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from finhpc.commands.export import export
from finhpc.commands.generate import generate
from finhpc.data.examples.batches import Batches
from finhpc.data.examples.examples import make_examples
from finhpc.evaluation.language_model import LanguageModel
from finhpc.evaluation.models import load_for_evaluation, subjects
from finhpc.generation.generator import Generator
from finhpc.log import redirected
from finhpc.models.export.formats import RUNTIMES
from finhpc.models.files import source
from finhpc.models.files import tokenizer as tokenizer_file
from finhpc.models.loading import load_model
from finhpc.quantization.schemes import SCHEMES
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.finetune import Instructions
from finhpc.settings.generate import GenerateConfig
from finhpc.settings.training import Parallel
from tests.generation.folders import Passes
from tests.models.packs import plain_loss
from tests.parity.adapters import ADAPTERS, NONE, Kind, make_ours, make_peft
from tests.parity.bases import BASES, FAMILY_ROWS, JOINT, NOT_IN_GGUF, Base, State, state_of
from tests.parity.pairwise import Combination, pairwise
from tests.parity.table import Cell, Row
from tests.parity.text import PAIRS
from tests.parity.tokenizer_kinds import KINDS, tokenizer_of
from tests.parity.tokenizer_kinds import Kind as TokenizerKind

NEW = 6
EXACT = 2e-5  # of the largest logit: float32 sums in another order
BITSANDBYTES = 0.08  # int8 rounds a layer's inputs as well, and NF4 computes in bfloat16 on CPUs that have it
TOLERANCES = {"": EXACT, "int8": BITSANDBYTES, "nf4": BITSANDBYTES}
ADAPTER_COLUMNS = ("load_model", "generate", "generate, adapter's folder", "evaluate", "evaluate, adapter's folder")


@dataclass(frozen=True)
class Format:
    """What `finhpc export` is asked for."""

    format: str
    bits: int = 16
    scheme: str = "minmax"
    dtype: str = "float32"

    def __str__(self) -> str:
        quantized = f", {self.scheme} {self.bits}" if self.bits < 16 else ""
        return f"{self.format}{quantized}{'' if self.dtype == 'float32' else f', {self.dtype}'}"


def _formats() -> dict[str, Format]:
    """Every format that the settings of export allow."""
    fields = ExportConfig.model_fields
    others = {"adapter", *RUNTIMES}  # not a model, or not for transformers
    kinds = [kind for kind in get_args(fields["format"].annotation) if kind not in others]
    found = [Format(kind) for kind in kinds]
    found += [Format(kind, bits, name) for kind in kinds for name, scheme in SCHEMES.items() for bits in scheme.bits]
    dtypes = [dtype for dtype in get_args(fields["dtype"].annotation) if dtype not in ("auto", "float32")]
    found += [Format("merged", dtype=dtype) for dtype in dtypes]
    return {str(one): one for one in found}


FORMATS = _formats()
AXES = {
    "family": list(FAMILY_ROWS),
    "base": list(BASES),
    "adapter": list(ADAPTERS),
    "tokenizer": list(KINDS),
    "export": list(FORMATS),
}


def allowed(chosen: Combination) -> bool:
    """Whether there is such a combination at all."""
    if chosen.get("base") == JOINT and not chosen.get("family", "gpt2").startswith("gpt2"):
        return False
    if chosen.get("base") != "GGUF":
        return True
    # A GGUF file has its own tokenizer, of the byte-level kind.
    return chosen.get("family") not in NOT_IN_GGUF and chosen.get("tokenizer", "byte level") == "byte level"


def combinations() -> list[Combination]:
    return pairwise(AXES, allowed)


# What a base does not allow whatever the adapter: column -> what the refusal says.
QUANTIZED = {"finetune": "quantized already", "export": "quantized already"}
REFUSED = dict.fromkeys(("minmax, 8 bits", "minmax, 4 bits", "int8", "nf4"), QUANTIZED)
# transformers does not read biases and scaled positions from a Llama's file.
UNREADABLE = {("llama, biases, scaled positions", "GGUF"): "blk.0.attn_q.bias"}


def expected(chosen: Combination) -> dict[str, str]:
    """Column -> what its refusal says, of those that the base or the export's format brings with it."""
    if word := UNREADABLE.get((chosen["family"], chosen["base"])):
        return dict.fromkeys((*ADAPTER_COLUMNS, "finetune", "export"), word)
    if chosen["base"] in ("low-rank", JOINT) and chosen["adapter"] != NONE and chosen["export"].startswith("native"):
        return {"export": "format=native"}  # B A would have to grow by the adapter's rank
    return REFUSED.get(chosen["base"], {})


def weights_row(chosen: Combination, folder: Path) -> Row:
    """What every command makes of one combination; `folder` does not exist yet."""
    row = Row(dict(chosen))
    with warnings.catch_warnings(), row.column("made"):
        warnings.simplefilter("ignore")
        base = BASES[chosen["base"]](FAMILY_ROWS[chosen["family"]][1](), folder / "base")
        if base.path.is_dir():
            tokenizer_of(TokenizerKind(chosen["tokenizer"])).save_pretrained(base.path)
        case = _Case(row, base, ADAPTERS[chosen["adapter"]], FORMATS[chosen["export"]], folder)
        if case.make_adapter():
            case.run()
        case.judge(chosen)
    if row.cells["made"].fault is None:
        del row.cells["made"]
    return row


class _Case:
    """One combination. `reference`: the plain model under peft; `tokens`: what its logits are compared on."""

    def __init__(self, row: Row, base: Base, kind: Kind | None, format: Format, folder: Path) -> None:
        self.row, self.base, self.kind, self.format, self.folder = row, base, kind, format, folder
        self.adapter = folder / "adapter" if kind is not None else None
        self.tolerance = TOLERANCES.get(row.axes["base"], EXACT)
        draw = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(8, 100, (2, 16), generator=draw)
        self.tokens[0, 5:7] = torch.tensor([9, 3])  # what wakes an aLoRA

    # -- the combination ------------------------------------------------------------------------

    def make_adapter(self) -> bool:
        """Write the adapter and check finetuning; False where there is none to go on with."""
        self.layers: Any = None
        state = self.base.state
        if self.kind is not None and self.kind.ours:
            assert self.adapter is not None
            with self.row.column("finetune"):
                self.layers = make_ours(self.kind, self.base, self.adapter)
            if self.layers is None:
                return False
            if how := self.kind.quantization:
                state = self.base.quantized(state, how["scheme"], how["bits"], linear=True)
        elif self.kind is not None:
            try:
                make_peft(self.kind, self.base, self.folder / "adapter")
                self._refer(state)
                return True
            except Exception as error:  # peft does not have everything for every architecture
                self.row.cells["peft"] = Cell(refusal=f"peft itself: {type(error).__name__}: {error}"[:100])
                return False
        self._refer(state)
        return True

    def _refer(self, state: State) -> None:
        """Open the reference, and compute what all commands are compared with."""
        self.reference: Any = self.base.plain(state)
        if self.adapter is not None:
            self.reference = PeftModel.from_pretrained(self.reference, str(self.adapter)).eval()
        self.wanted = self.logits(self.reference)

    def run(self) -> None:
        self._finetune()
        place = self.base.path if self.adapter is None else self.adapter
        with self.row.column("load_model") as report:
            report(self.differ(self.logits(load_model(place))))
        with self.row.column("generate") as report:
            report(self._generate(self.base.path, self.adapter))
        with self.row.column("evaluate") as report:
            report(self._evaluate(self.base.path, self.adapter))
        if self.adapter is not None:
            with self.row.column("generate, adapter's folder") as report:
                report(self._generate(self.adapter, None))
            with self.row.column("evaluate, adapter's folder") as report:
                report(self._evaluate(self.adapter, None))
        self._export(place)

    # -- commands -------------------------------------------------------------------------------

    def _finetune(self) -> None:
        """The loss of packs of examples: with the adapter as it was trained, or with one that adds nothing yet."""
        if self.kind is not None and not self.kind.ours:
            return
        with self.row.column("finetune") as report:
            if self.layers is None:
                self.layers = make_ours(Kind(lora={}), self.base, self.folder / "fresh")
                for layer in self.layers:
                    for name, parameter in layer.parameters_by_name():
                        parameter.data.mul_(not name.endswith(".B"))
            file = self.folder / "pairs.jsonl"
            file.write_text("".join(json.dumps({"context": a, "target": b}) + "\n" for a, b in PAIRS))
            tokenizer = source.tokenizer_of(self.base.path)
            settings = Instructions(source=[str(file)], eval_fraction=0.0, max_len=96)
            train = make_examples(settings, tokenizer, 0).train
            (micro,) = Batches(Parallel(micro_batch_size=len(train)), 0).step(train, 0, 0)
            flow: Any = torch.as_tensor(np.asarray(micro["pack"]))
            with torch.no_grad():
                for layer in self.layers:
                    flow = layer(flow)
                some = [(ids.tolist(), int(carries.sum())) for ids, carries in map(train.example, range(len(train)))]
                wanted = float(plain_loss(self.reference, some))
            scheme = self.kind.quantization.get("scheme", "") if self.kind is not None else ""
            report(self.near(abs(float(flow) - wanted) / wanted, TOLERANCES.get(scheme, EXACT)))

    def _generate(self, model: Path, adapter: Path | None) -> float:
        """Logits with the keys and values of tokens before, and greedy text of prompts computed together."""
        tree = {"model": str(model), "dtype": "float32"}
        tree |= {"sampling": {"max_new_tokens": NEW, "stop_at_eos": False}}
        if adapter is not None:
            tree |= {"adapters": [f"a={adapter}"], "adapter": "a"}
        generator = Generator(build(GenerateConfig, tree | {"prompt": "unused"}))
        generator.adapters.select([generator.config.adapter])
        passed = Passes(generator.decoder, *self.tokens.shape)
        parts = (self.tokens[:, :13], *self.tokens[:, 13:].split(1, dim=1))
        found = [passed(part.tolist()) for part in parts]
        worst = self.differ(torch.stack(found, 1), self.wanted[:, 12:])
        file = self.folder / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt, _ in PAIRS))
        if self.tolerance == EXACT:
            answers = generate(build(GenerateConfig, tree | {"prompts": str(file)}))["answers"]
            tokenizer = generator.tokenizers[generator.config.adapter]
            for (prompt, _), answer in zip(PAIRS, answers, strict=True):
                self._check_text(tokenizer, generator.encode(prompt, generator.config.adapter), answer["text"])
        return worst

    def _check_text(self, tokenizer: Any, prompt: list[int], text: str) -> None:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(NEW):
                ids.append(int(self.reference(torch.tensor([ids])).logits[0, -1].argmax()))
        read = tokenizer.decode(prompt, skip_special_tokens=True)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        wanted = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        joined = whole[len(read) :] if whole.startswith(read) else wanted
        assert text in (joined, wanted), f"the greedy text is {text!r}, not {joined!r}"

    def _evaluate(self, model: Path, adapter: Path | None) -> float:
        """Logits, and log-likelihoods of answers."""
        (subject,) = subjects([str(model)], [str(adapter)] if adapter is not None else [])
        opened, tokenizer = load_for_evaluation(subject.path, subject.adapter, "float32")
        worst = self.differ(self.logits(opened))
        lm = LanguageModel(opened, tokenizer, 4)
        rows = self.tokens.tolist()
        requests: Any = [(("", ""), row[:-cut], row[-cut:]) for row in rows for cut in (1, 3)]
        log_probs = torch.log_softmax(self.wanted, -1)
        for (_, context, answer), (score, _) in zip(requests, lm._loglikelihood_tokens(requests, True), strict=True):
            number = rows.index([*context, *answer])
            places = range(len(context) - 1, len(context) + len(answer) - 1)
            wanted = sum(float(log_probs[number, at, token]) for at, token in zip(places, answer, strict=True))
            worst = max(worst, self.near(abs(score - wanted) / max(1.0, abs(wanted))))
        return worst

    def _export(self, place: Path) -> None:
        """The export, and every command on it."""
        out, format = self.folder / "out", self.format
        tree = {"model": str(place), "out": str(out), "format": format.format, "dtype": format.dtype}
        with self.row.column("export"):
            export(build(ExportConfig, tree | {"quantization": {"bits": format.bits, "scheme": format.scheme}}))
        if not (out / "config.json").is_file():
            return
        self.reference = self._exported_reference()
        self.wanted = self.logits(self.reference)
        if format.bits < 16:
            self.tolerance = TOLERANCES.get(format.scheme, EXACT)
        with self.row.column("export, load_model") as report:
            report(self.differ(self.logits(load_model(out))))
        if format.bits < 16:
            with self.row.column("export, weights") as report:
                report(self._weights(load_model(out)))
        with self.row.column("export, generate") as report:
            report(self._generate(out, None))
        with self.row.column("export, evaluate") as report:
            report(self._evaluate(out, None))
        with self.row.column("export, transformers") as report:
            report(self.differ(self.logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval())))
        with self.row.column("export, tokenizer"):
            self._check_tokenizer(out)

    def _weights(self, model: Any) -> float:
        """The largest difference of the numbers that codes stand for, whatever computes with them."""
        wanted, worst = self.reference.state_dict(), 0.0
        for name, found in state_of(model, self.base.plain()).items():
            difference = (found - wanted[name]).abs().max() / wanted[name].abs().max()
            worst = max(worst, self.near(float(difference), EXACT))
        return worst

    def _check_tokenizer(self, out: Path) -> None:
        """The export reads as its base does, by transformers, too, or a line says that this one takes another class."""
        given, plain = source.tokenizer_of(self.base.path), AutoTokenizer.from_pretrained(out)
        tokenizer_file._report.cache_clear()
        lines: list[str] = []
        with redirected(lines.append):
            ours = source.tokenizer_of(out)
        for prompt, answer in PAIRS:
            ids = given(prompt + answer).input_ids
            assert ours(prompt + answer).input_ids == ids, "the export's tokenizer is another"
            assert plain(prompt + answer).input_ids == ids or any("AutoTokenizer uses" in line for line in lines)
        assert ours.chat_template == given.chat_template, "the export's chat template is another"

    def _exported_reference(self) -> Any:
        """The plain model with the weights that the export is to hold."""
        merged: Any = self.reference
        if self.adapter is not None:
            merged = self.reference.merge_and_unload()
        state = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
        if self.format.bits < 16:
            factors = self.format.format == "native"
            state = self.base.quantized(state, self.format.scheme, self.format.bits, factors=factors)
        dtype = getattr(torch, self.format.dtype)
        return self.base.plain({name: tensor.to(dtype).float() for name, tensor in state.items()})

    # -- comparing ------------------------------------------------------------------------------

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(self.tokens).logits[:, -self.tokens.shape[1] :]
        return found

    def differ(self, found: Tensor, wanted: Tensor | None = None) -> float:
        """The largest difference of logits, as a share of the largest logit."""
        wanted = self.wanted if wanted is None else wanted
        return self.near(float((found - wanted).abs().max() / wanted.abs().max()))

    def near(self, difference: float, tolerance: float | None = None) -> float:
        tolerance = self.tolerance if tolerance is None else tolerance
        assert difference <= tolerance, f"differs by {difference:.1e} from the reference (at most {tolerance:.0e})"
        return difference

    # -- agreement ------------------------------------------------------------------------------

    def judge(self, chosen: Combination) -> None:
        """A refusal is one that is expected, or names what the adapter has; then all commands refuse it alike."""
        wanted, word = expected(chosen), self.kind.word if self.kind is not None else ""
        columns = [name for name in ("finetune", *ADAPTER_COLUMNS, "export") if name in self.row.cells]
        cells = {name: self.row.cells[name] for name in columns}
        for name, cell in cells.items():
            if cell.fault is not None:
                continue
            if name in wanted and wanted[name] not in (cell.refusal or ""):
                self.row.cells[name] = Cell(fault=f"not refused with {wanted[name]!r}, but: {cell}")
            elif name not in wanted and cell.refusal is not None and not (word and word in cell.refusal):
                self.row.cells[name] = Cell(fault=f"refused for another reason than {word or 'any'}: {cell.refusal}")
        free = {name: cell for name, cell in cells.items() if name not in wanted and name != "finetune"}
        applied = [name for name, cell in free.items() if cell.difference is not None]
        refused = [name for name, cell in free.items() if cell.refusal is not None]
        if applied and refused:
            message = f"refused here, applied by {', '.join(applied)}: {cells[refused[0]].refusal}"
            self.row.cells[refused[0]] = Cell(fault=message)
