"""The settings of each `finhpc bench NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from finhpc.settings.base import Section
from finhpc.settings.estimate import PlannedBase
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import Method, Model, PretrainConfig
from finhpc.settings.training import Resources, Schedule


class Bench(Section):
    """How often a measurement is repeated, and where its result is written."""

    repeats: int = Field(5, ge=1, description="pairs measured, in turn; ratios are medians over pairs")
    out: str = Field("runs/bench", description="folder of the measurements: one folder each, with result.json")


class BenchShards(Section):
    shards: str | None = Field(None, description="folder written by `finhpc prepare`; default: random ones")
    seq_len: int = Field(1024, ge=2, description="tokens per sample; also the block length of random shards")


class DataBench(Section):
    """Settings of `finhpc bench data`."""

    bench: Bench = Field(default_factory=Bench)
    data: BenchShards = Field(default_factory=BenchShards)
    micro_batch_size: int = Field(8, ge=1, description="samples per micro-batch")
    tokens: int = Field(12 << 22, ge=1, description="tokens read in each pass, in whole shards")
    consumer_tokens_per_s: float = Field(
        500_000, gt=0, description="pace of the consumer that waiting is measured with"
    )
    consumer_tokens: int = Field(4_000_000, ge=1, description="tokens it takes in each pass")


class TrainBench(Section):
    """Settings of `finhpc bench train`."""

    bench: Bench = Field(default_factory=Bench)
    model: Model = Field(default_factory=lambda: Model(preset="gpt2-127m"))
    ranks: list[int] = Field([192, 96, 48], min_length=1, description="ranks of the low-rank models; the first counts")
    precisions: list[Literal["fp32", "bf16"]] = Field(["fp32", "bf16"], min_length=1, description="each is measured")
    batch: int = Field(4, ge=1, description="samples per step")
    seq_len: int = Field(256, ge=2, description="tokens per sample")
    compiled: bool = Field(
        True, description="also measure compiled steps of the dense ways and of the first rank, if there is a compiler"
    )
    ray: bool = Field(True, description="measure a whole `finhpc pretrain`; false: the engine alone, without Ray")
    overhead_pairs: int = Field(3, ge=1, description="pairs of a whole run and a plain loop")
    overhead_steps: int = Field(24, ge=8, description="steps of each; the first quarter warms up")
    resources: Resources = Field(default_factory=lambda: Resources(threads=2, cpus_per_worker=2))


class PrepareBench(Section):
    """Settings of `finhpc bench prepare`."""

    bench: Bench = Field(default_factory=lambda: Bench(repeats=2))
    source: list[str] = Field(
        default_factory=lambda: ["docs"], description="text as for prepare; its documents are repeated, salted"
    )
    tokenizer: str = Field("gpt2", description="as for prepare")
    block_len: int = Field(1024, ge=2, description="as for prepare")
    val_fraction: float = Field(0.01, gt=0, lt=1, description="as for prepare")
    tokens: int = Field(10_000_000, ge=1000, description="tokens of the corpus")
    workers: int = Field(0, ge=0, description="parallel tasks, and num_proc of datasets.map; 0: one per core")


class PipelineBench(Section):
    """Settings of `finhpc bench pipeline`."""

    bench: Bench = Field(default_factory=lambda: Bench(repeats=3))
    model: Model = Field(default_factory=lambda: Model(preset="gpt2-127m"))
    method: Method = Field(default_factory=lambda: Method(kind="dense"))
    stages: int = Field(2, ge=2, description="pipeline stages, one process each")
    micro_batches: list[int] = Field(
        [1, 2, 4, 8, 16], min_length=1, description="micro-batches per step, each measured"
    )
    schedules: list[Schedule] = Field(
        ["1f1b", "dualpipev"], min_length=1, description="as parallel.schedule; each is measured"
    )
    micro_batch_size: int = Field(1, ge=1, description="samples per micro-batch")
    seq_len: int = Field(256, ge=2, description="tokens per sample")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast over float32 weights")
    counted: bool = Field(True, description="also measure the cut by counted operations, if it differs")
    resources: Resources = Field(default_factory=Resources)


class RecomputeBench(Section):
    """Settings of `finhpc bench recompute`."""

    bench: Bench = Field(default_factory=Bench)
    model: Model = Field(default_factory=lambda: Model(preset="gpt2-127m"))
    method: Method = Field(default_factory=lambda: Method(kind="dense"))
    batch: int = Field(1, ge=1, description="samples per pass")
    seq_len: int = Field(1024, ge=2, description="tokens per sample")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast over float32 weights")
    resources: Resources = Field(default_factory=lambda: Resources(threads=2))


class DecomposeBench(Section):
    """Settings of `finhpc bench decompose`. `resources.threads`: of the SVD, and as many workers of one thread."""

    bench: Bench = Field(default_factory=lambda: Bench(repeats=3))
    model: Model = Field(default_factory=lambda: Model(preset="gpt2-1.5b"))
    path: Path | None = Field(None, description="folder of a dense model; default: random weights of the shape")
    keep_params: float = Field(0.5, gt=0, le=1, description="share of each weight's parameters that is kept")
    rank: int | None = Field(None, ge=1, description="rank of every weight; default: by keep_params")
    blocks: int = Field(4, ge=0, description="blocks of the shape that are measured; 0: all")
    resources: Resources = Field(default_factory=lambda: Resources(threads=2))


class FinetuneBench(Section):
    """Settings of `finhpc bench finetune`."""

    bench: Bench = Field(default_factory=lambda: Bench(repeats=3))
    model: str | None = Field(None, description="base: a Hugging Face folder or a hub id; required")
    source: str | None = Field(None, description="examples, as data.source of finetune; required")
    examples: int = Field(160, ge=1, description="examples of a pass, in whole batches; the first batch warms up")
    batch: int = Field(16, ge=1, description="examples per step")
    rank: int = Field(8, ge=1, description="rank of the adapters, on every linear layer except the head")
    dora: bool = Field(False, description="measure DoRA instead of LoRA, on both sides")
    bits: list[Annotated[Literal[16, 8, 4], BeforeValidator(int)]] = Field(
        [16, 4], min_length=1, description="bases: bfloat16, int8, NF4"
    )
    lr: float = Field(1e-3, gt=0, description="learning rate")
    compiled: bool = Field(
        True, description="also measure compiled steps of finhpc and of peft's loop, if there is a compiler"
    )
    resources: Resources = Field(default_factory=lambda: Resources(threads=2, device="cpu"))


class ContextBench(Section):
    """Settings of `finhpc bench context`."""

    bench: Bench = Field(default_factory=lambda: Bench(repeats=3))
    model: str | None = Field(None, description="base: a Hugging Face folder, a hub id or a GGUF file; required")
    lengths: list[Annotated[int, Field(ge=2)]] = Field(
        [512, 1024, 2048, 4096, 8192], min_length=1, description="tokens of the inputs, each measured"
    )
    answer: int = Field(32, ge=1, description="tokens at the end of each that are learned")
    rank: int = Field(8, ge=1, description="rank of the adapters, on every linear layer except the head")
    bits: Annotated[Literal[16, 8, 4], BeforeValidator(int)] = Field(16, description="base: bfloat16, int8, NF4")
    resources: Resources = Field(default_factory=lambda: Resources(threads=2, device="cpu"))


class GenerateBench(Section):
    """Settings of `finhpc bench generate`."""

    bench: Bench = Field(default_factory=lambda: Bench(repeats=3))
    models: list[str] = Field(
        ["gpt2-127m:192", "gpt2-1.5b:384"], min_length=1, description="PRESET:RANK, each compared with its dense shape"
    )
    batches: list[int] = Field([1, 16], min_length=1, description="prompts at once; the first counts for the ratios")
    bits: list[Annotated[Literal[16, 8, 4], BeforeValidator(int)]] = Field(
        [16, 8, 4], min_length=1, description="of the low-rank models; the first counts"
    )
    schemes: list[Literal["minmax", "int8", "nf4"]] = Field(
        ["minmax", "int8", "nf4"], description="of models below 16 bits, if the scheme has these bits"
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="of weights that are not quantized")
    prompt: int = Field(100, ge=1, description="tokens of each prompt")
    new: int = Field(100, ge=2, description="tokens generated after each")
    adapters: int = Field(8, ge=2, description="adapters over one base, one per row of a batch")
    adapter_rank: int = Field(8, ge=1, description="rank of each")
    adapters_model: str = Field("smollm2-135m", description="preset of that base")
    requests: int = Field(32, ge=2, description="requests of mixed lengths over that base, one at a time and batched")
    resources: Resources = Field(default_factory=lambda: Resources(threads=2))


class Counting(Section):
    """Where the counts are written."""

    out: str = Field("runs/bench", description="folder of the measurements: one folder each, with result.json")


class StepBench(PretrainConfig):
    """Settings of `finhpc bench step`: those of `finhpc pretrain`, of which no shards are needed."""

    bench: Counting = Field(default_factory=Counting)


class CountedExamples(Counting):
    """Where the counts are written, and the sizes of the examples, whose lengths differ."""

    tokens: int = Field(64, ge=4, description="tokens of the longest example; the shortest has half as many")
    answer: int = Field(2, ge=1, description="tokens of each answer, which count for the loss")
    shared: int = Field(24, ge=0, description="tokens of a prefix that all examples share")


class FinetuneStepBench(FinetuneConfig):
    """Settings of `finhpc bench step finetune`: those of `finhpc finetune`, of which no examples are needed."""

    model: PlannedBase = Field(default_factory=PlannedBase)
    bench: CountedExamples = Field(default_factory=CountedExamples)

    def problems(self) -> list[str]:
        """Return every contradiction between settings, each with its remedy."""
        work, problems = self.bench, super().problems()
        if work.shared + work.answer >= work.tokens // 2:
            problems.append(
                f"bench.shared={work.shared} and bench.answer={work.answer} do not fit into the shortest example, of "
                f"bench.tokens={work.tokens} / 2 tokens; raise bench.tokens."
            )
        return problems


class GpuBench(Section):
    """Settings of `finhpc bench gpu`."""

    bench: Counting = Field(default_factory=Counting)
    budget_s: float = Field(340, ge=0, description="seconds after which no further case begins")
    pretrain: list[str] = Field(
        ["gpt2-127m", "gpt2-127m:192", "gpt2-1.5b", "gpt2-1.5b:384"], description="PRESET or PRESET:RANK, pretrained"
    )
    finetune: list[str] = Field(["smollm2-135m", "llama-1b", "llama2-7b"], description="presets, finetuned with LoRA")
    bits: list[Annotated[Literal[16, 8, 4], BeforeValidator(int)]] = Field(
        [16, 8, 4], min_length=1, description="bases of the finetuning"
    )
    generate: list[str] = Field(["gpt2-127m:192"], description="PRESET:RANK, as for bench generate")
    ways: list[Literal["plain", "eager", "compiled"]] = Field(
        ["plain", "eager", "compiled"],
        min_length=1,
        description="plain: transformers (and peft); eager, compiled: finhpc with train.compile off and on",
    )
    batch: int = Field(8, ge=1, description="samples per step of a pretraining")
    seq_len: int = Field(1024, ge=2, description="tokens per sample")
    examples: int = Field(16, ge=1, description="examples per step of a finetuning")
    tokens: int = Field(256, ge=60, description="tokens of the longest example")
    steps: int = Field(10, ge=1, description="steps that are timed")
    warm_up: int = Field(3, ge=1, description="steps before them")
    new: int = Field(64, ge=2, description="tokens generated after each prompt")
    resources: Resources = Field(default_factory=lambda: Resources(threads=4))


class ExportBench(Section):
    """Settings of `finhpc bench export`."""

    bench: Bench = Field(default_factory=Bench)
    model: str | None = Field(None, description="model folder, hub id or .gguf file; required")
    text: str | None = Field(None, description="file of plain text for perplexity and the prompt; required")
    formats: list[Literal["onnx", "gguf"]] = Field(["onnx", "gguf"], min_length=1, description="each is measured")
    bits: list[Annotated[Literal[8, 4], BeforeValidator(int)]] = Field([8, 4], min_length=1, description="each, too")
    prompt: int = Field(128, ge=1, description="tokens of the prompt")
    new: int = Field(64, ge=2, description="tokens generated after it")
    windows: int = Field(4, ge=1, description="windows of the text, for perplexity")
    seq_len: int = Field(256, ge=2, description="tokens of a window")
    python: str | None = Field(None, description="interpreter that has the runtimes; default: this one")
    resources: Resources = Field(default_factory=lambda: Resources(threads=2, device="cpu"))


class ServeBench(Section):
    """Settings of `finhpc bench serve`."""

    bench: Bench = Field(default_factory=lambda: Bench(repeats=2))
    model: str | None = Field(None, description="model folder or hub id; default: random weights of the preset's shape")
    preset: str = Field("smollm2-135m", description="shape of the model if none is given")
    users: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 8, 32, 64], min_length=1, description="users at once, each measured; with minutes: the first"
    )
    requests: int = Field(2, ge=1, description="requests of each user, on average")
    fewest: int = Field(16, ge=1, description="requests in all, at least")
    seconds: float = Field(60, gt=0, description="after which users begin no further request")
    prompt: int = Field(256, ge=4, description="tokens of the longest prompt; the shortest has a quarter")
    new: int = Field(128, ge=4, description="tokens of the longest answer; the shortest has a quarter")
    adapters: int = Field(8, ge=0, description="random adapters, which requests name in turn; 0: the model alone")
    adapter_rank: int = Field(8, ge=1, description="rank of each")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="of the weights")
    cache_bytes: int = Field(1 << 30, ge=1, description="memory for keys and values, of each server")
    vllm: str | None = Field(
        None,
        description="interpreter that has vLLM, whose server is measured on the merged model; default: not",
    )
    vllm_adapters: bool = Field(True, description="measure vLLM with the adapters, too")
    minutes: float | None = Field(
        None,
        gt=0,
        description="load finhpc alone for so long and record its memory, while an adapter comes and goes; default: "
        "measure each of users in turn",
    )
    visit_s: float = Field(30, gt=0, description="seconds between two visits of that adapter")
    resources: Resources = Field(default_factory=lambda: Resources(threads=2, device="cpu"))
