"""Makes the pictures in this folder, of MLflow's pages and of terminals: tiny models are trained, a browser draws.

    python docs/pictures/make.py [FOLDER]

FOLDER stores the runs (default: runs/pictures); finished ones are not trained again. It needs chromium or google-chrome
on PATH, and about a quarter of an hour on two cores.
"""

from __future__ import annotations

import html
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

import finhpc
from finhpc.cluster.connect import ray_cluster
from finhpc.commands.ui import serving
from finhpc.settings.base import build
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.settings.prepare import PrepareConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import FinetuneSweepConfig, SweepConfig
from finhpc.settings.training import default_tracking_uri
from finhpc.tracking.pages import pages_of

HERE = Path(__file__).parent
SIZE, SHOWN = (1680, 800), 1256  # pixels; on the right MLflow opens its assistant
WORDS = ("profit", "loss", "sales", "costs", "orders", "shares", "margin", "revenue")
MOVES = {"positive": "rose", "negative": "fell", "neutral": "did not change"}


def main(folder: Path) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder.mkdir(parents=True, exist_ok=True)
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("no chromium or google-chrome on PATH; install one of them.")
    terminals(browser, folder)
    for name in train(folder):
        uri = default_tracking_uri(folder / name)
        with serving(uri, port=5055) as (_, address):
            pages = pages_of(uri, None)
            for (title, page), picture in zip(pages, (f"compare-{name}", f"runs-{name}"), strict=True):
                draw(browser, f"{address}/{page}", HERE / f"{picture}.png")
                print(f"{picture}.png: {title}", flush=True)


def train(folder: Path) -> list[str]:
    """Plain runs, a pretraining sweep, a finetuning sweep and an evaluation, each in a storage of its own."""
    shards = text(folder)
    labels = folder / "news.txt"
    labels.write_text("".join(sentences()), encoding="utf-8")
    base: dict[str, Any] = {
        "model": {"preset": "gpt2-tiny", "layers": 2, "width": 64},
        "data": {"shards": str(shards), "seq_len": 64, "eval_samples": 32},
        "parallel": {"micro_batch_size": 8},
        "train": {"steps": 60, "eval_every": 20, "checkpoint_every": 0},
    }

    def run(storage: str, name: str) -> dict[str, Any]:
        return {"run": {"name": name, "storage": str(folder / storage)}}

    with ray_cluster():
        for name, method, lr in (
            ("dense", {"kind": "dense"}, 1e-3),
            ("rank-8", {"rank": 8}, 2e-3),
            ("rank-16", {"rank": 16}, 2e-3),
            ("cola-16", {"kind": "cola", "rank": 16}, 1e-3),
        ):
            own = {"method": method, "optimizer": {"lr": lr}}
            finhpc.pretrain(build(PretrainConfig, base | own | run("plain", name)))
        grid = {"method.kind": ["low_rank", "svd"], "method.rank": [8, 16, 32], "quantization.bits": [16, 8, 4]}
        finhpc.sweep(build(SweepConfig, base | {"grid": grid} | run("pretraining", "ranks")))
        models = {name: str(folder / "plain" / name / "model") for name in ("dense", "rank-8", "rank-16", "cola-16")}
        tuning = {
            "grid": {"lora.rank": [2, 4, 8], "quantization.bits": [16, 8, 4]},
            "model": {"path": models["dense"]},
            "data": {"source": [str(labels)], "max_len": 256, "eval_fraction": 0.2},
            "optimizer": {"lr": 1e-2},
            "train": {"steps": 200, "eval_every": 50, "checkpoint_every": 0},
        }
        finhpc.sweep(build(FinetuneSweepConfig, tuning | run("finetuning", "lora-ranks")))
        adapters = folder / "finetuning" / "lora-ranks" / "trials"
        scored = {
            "model": [models["dense"]] * 4,
            "adapter": ["none", *(str(adapters / f"rank{rank}-bits16" / "model") for rank in (2, 4, 8))],
            "tasks": ["fpb", "perplexity"],
            "data": {"files": {"fpb": str(labels)}, "shards": str(shards), "seq_len": 64},
            "limit": 60,
            "bootstrap": 100,
        }
        finhpc.evaluate(build(EvaluateConfig, scored | run("evaluation", "scores")))
    return ["plain", "pretraining", "finetuning", "evaluation"]


def text(folder: Path) -> Path:
    """Shards of the documentation of the installed packages."""
    shards = folder / "docs-of-packages"
    if not (shards / "manifest.json").is_file():
        settings = {"source": ["docs"], "tokenizer": "train:512", "out": str(shards), "block_len": 64}
        finhpc.prepare(build(PrepareConfig, settings))
    return shards


def sentences() -> list[str]:
    """Lines of a labelled file: what moved, and how."""
    return [
        f"The {word} of the company {move} in quarter {quarter} of year {year} .@{label}\n"
        for word in WORDS
        for quarter in range(1, 5)
        for year in range(1, 4)
        for label, move in MOVES.items()
    ]


def terminals(browser: str, folder: Path) -> None:
    """The last screens of the demo and of a small sweep, as a terminal of 80 columns shows them."""
    shards, storage = folder / "demo-shards", folder / "terminals"
    if not (shards / "manifest.json").is_file():
        finhpc_output(["prepare", "--config", "prepare-demo", "--out", str(shards)])
    place = ["--data.shards", str(shards), "--run.storage", str(storage)]
    demo = finhpc_output(["pretrain", "--config", "demo", *place])
    draw_terminal(browser, "finhpc pretrain --config demo --data.shards shards", demo, folder, HERE / "demo.png")
    small = "--model.layers 2 --model.width 64 --model.heads 2 --data.seq_len 64 --train.steps 60 --train.eval_every 20"
    grid = ["--grid", "method.rank=[8,16]", "--grid", "quantization.bits=[16,8,4]", "--run.name", "my-ranks"]
    swept = finhpc_output(["sweep", *grid, *small.split(), *place])
    command = "finhpc sweep --grid 'method.rank=[8,16]' --grid 'quantization.bits=[16,8,4]' ..."
    draw_terminal(browser, command, swept, folder, HERE / "sweep.png")


def finhpc_output(words: list[str]) -> str:
    """What a command writes to a terminal of 80 columns that takes no progress bar."""
    done = subprocess.run(
        [sys.executable, "-m", "finhpc", *words],
        env={**os.environ, "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout)
    return done.stdout


def draw_terminal(browser: str, command: str, output: str, folder: Path, picture: Path, most: int = 44) -> None:
    """The command and the last `most` lines of its output, as a picture; the folder's own path is left out."""
    text = output.replace(f"{folder}/", "").replace("terminals/", "runs/").rstrip()
    lines = [line[i : i + 100] for line in text.splitlines() for i in range(0, max(len(line), 1), 100)]
    shown = lines if len(lines) <= most else ["...", *lines[-most:]]
    text = html.escape("\n".join([f"$ {command}", *shown]))
    page = folder / "terminal.html"
    style = "margin:0;padding:14px;background:#10191c;color:#d7e3e4;font:14px/18px 'DejaVu Sans Mono',monospace"
    page.write_text(f'<meta charset="utf-8"><body style="{style}"><pre style="margin:0">{text}</pre>', encoding="utf-8")
    widest = max(len(line) for line in (f"$ {command}", *shown))
    take(browser, page.as_uri(), picture, (round(8.45 * widest) + 30, 18 * (len(shown) + 1) + 28))
    Image.open(picture).convert("RGB").quantize(32).save(picture, optimize=True)
    print(f"{picture.name}: {command}", flush=True)


def take(browser: str, address: str, picture: Path, size: tuple[int, int]) -> None:
    """A screenshot of a page, once it has loaded everything."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        command += [f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=20000"]
        command += [f"--screenshot={picture}", address]
        subprocess.run(command, check=True, timeout=180, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def draw(browser: str, address: str, picture: Path) -> None:
    """A page of MLflow as a browser draws it, without the assistant on its right."""
    take(browser, address, picture, SIZE)
    whole = Image.open(picture)
    whole.convert("RGB").crop((0, 0, SHOWN, SIZE[1])).quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/pictures").absolute())
