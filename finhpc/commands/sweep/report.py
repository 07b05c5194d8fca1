"""The output of a sweep: a line as each trial ends, then the ranked table, on screen and as CSV."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from typing import Any

from finhpc.commands.sweep.grid import AnySweep
from finhpc.commands.sweep.plan import SweepPlan
from finhpc.commands.sweep.trial import Trial, read_outcome
from finhpc.runs.result import compare_command
from finhpc.screen import duration, rows_table, summary_table
from finhpc.settings.finetune import FinetuneConfig
from finhpc.training.journal import WORKER_FILE, read

log = logging.getLogger(__name__)

Row = dict[str, Any]
FIGURES = (  # of each row, the names they have in every result and in MLflow
    "val_loss", "val_perplexity", "held_out_weighted_f1", "params_total", "params_trainable", "compression_ratio",
    "size_bytes", "size_16bit_bytes", "size_8bit_bytes", "size_4bit_bytes", "tokens_per_s", "worker_hours", "steps",
)  # fmt: skip

SHOWN = {
    "val_loss": ("val loss", "{:.4f}"),
    "held_out_weighted_f1": ("weighted F1", "{:.3f}"),
    "params_trainable": ("parameters trained", "{:,.0f}"),
    "compression_ratio": ("compression", "{:.2f}"),
    "size_bytes": ("size MB", "{:,.2f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
}
MOST_ROWS = 60
LINE_EVERY_S = 15.0


def ranked(plan: SweepPlan) -> list[Row]:
    """A row per grid point, the best first; those that did not end well come last, without a place.

    `scored_only`: whether the row scores, at other bits, the model that the training of another row made.
    """
    rows = [row for trial in plan.trials for row in _rows(plan, trial)]
    options = plan.options
    metric = options.metric or ("held_out_weighted_f1" if isinstance(plan.config, FinetuneConfig) else "val_loss")
    more = options.mode == "max" if options.mode else "f1" in metric or "accuracy" in metric
    if options.metric is None and metric != "val_loss" and all(row[metric] is None for row in rows):
        metric, more = "val_loss", False  # finetuned on texts: there are no labels to score
        log.info("no held-out example has a label; the trials are ranked by val_loss.")
    well = [row for row in rows if row["status"] == "finished" and row.get(metric) is not None]
    well.sort(key=lambda row: (-row[metric] if more else row[metric], row["trial"]))
    for i, row in enumerate(well):
        row["place"] = i + 1
    return well + [row for row in rows if row not in well]


def _rows(plan: SweepPlan, trial: Trial) -> Iterator[Row]:
    outcome = read_outcome(plan.run_folder(trial.name))
    for i, (name, values) in enumerate(trial.points):
        figures = outcome if name == trial.name or "scored" not in outcome else outcome["scored"].get(name, {})
        row: Row = {"place": None, "trial": name, "status": outcome.get("status", "not run"), "values": values}
        row |= {key: figures.get(key) for key in FIGURES}
        row["size_bytes"] = row["size_bytes"] or row["size_16bit_bytes"]
        peaks = [peak for peak in outcome.get("peak_memory_bytes") or [] if peak is not None]
        row["peak_memory_bytes"] = sum(peaks) if peaks else None
        spans = outcome.get("trial_s"), outcome.get("train_s")
        scoring = sum(score["score_s"] for score in outcome.get("scored", {}).values())
        row |= {
            "scored_only": i > 0,
            "train_s": spans[1],
            "fixed_s": spans[0] - spans[1] - scoring if spans[0] and spans[1] else None,
            "model": figures.get("model"),
            "mlflow_run_id": figures.get("mlflow_run_id"),
            "error": outcome.get("error"),
        }
        yield row


def flat(rows: list[Row]) -> list[Row]:
    """The rows with a column for each key that varies, for a table or a CSV file."""
    return [
        {"place": r["place"], "trial": r["trial"]} | r["values"] | {k: r[k] for k in r if k != "values"} for r in rows
    ]


def show(config: AnySweep, result: Row) -> None:
    """Print the ranked table and the best trial."""
    shown = []
    for row in result["trials"][:MOST_ROWS]:
        line: Row = {"place": row["place"] or "-", "trial": row["trial"]}
        for key, (title, form) in SHOWN.items():
            if any(other[key] is not None for other in result["trials"]):
                value = row[key] if key != "size_bytes" or row[key] is None else row[key] / 1e6
                line[title] = "-" if value is None else form.format(value)
        line["status"] = row["status"]
        shown.append(line)
    rows_table(f"sweep {config.run.name}", shown)
    if len(result["trials"]) > MOST_ROWS:
        log.info(f"and {len(result['trials']) - MOST_ROWS} more, in {shlex.quote(result['folder'])}/trials.csv")
    for row in result["trials"]:
        if row["error"] and not row["scored_only"]:
            log.info(f"{row['trial']}: {row['error']}")
    best = result["best"]
    summary = [
        ("best", str(best and best["trial"])),
        ("model", str(result["model"])),
        ("registered as", str(result["registered"])),
        ("steps trained", f"{result['steps_trained']:,}"),
        ("time", duration(result["wall_s"])),
        ("table", f"{result['folder']}/trials.csv"),
        ("compare", compare_command(config, "--run.name", config.run.name)),
    ]
    summary_table(f"sweep {config.run.name}", summary)


class Follower:
    """Prints the progress of trials: a line as one ends, and now and then the newest losses of those that run."""

    def __init__(self, plan: SweepPlan, trials: Sequence[Trial]) -> None:
        self.plan, self.began = plan, time.monotonic()
        self.left = {trial.name for trial in trials if not plan.has_ended(trial)}
        self.total, self.at_start = len(trials), len(self.left)
        self.last_line = time.monotonic()

    def update(self) -> None:
        """Report trials that have ended since the last call."""
        for name in sorted(self.left):
            outcome = read_outcome(self.plan.run_folder(name))
            if outcome:
                self.left.discard(name)
                self._report_end(name, outcome)
        if time.monotonic() - self.last_line > LINE_EVERY_S and self.left:
            self._report_running()

    def _report_end(self, name: str, outcome: Row) -> None:
        loss, seconds = outcome.get("val_loss"), outcome.get("trial_s")
        figures = "" if loss is None else f", val loss {loss:.4f}"
        figures += "" if seconds is None else f", {seconds:.0f} s"
        why = f": {outcome['error'].splitlines()[0]}" if outcome.get("error") else ""
        left, ended = "", self.at_start - len(self.left)
        if ended and self.left:
            seconds = (time.monotonic() - self.began) / ended * len(self.left)
            left = f"; {len(self.left)} left, about {duration(seconds)}"
        log.info(f"trial {self.total - len(self.left)}/{self.total} {name}: {outcome['status']}{figures}{why}{left}")
        self.last_line = time.monotonic()

    def _report_running(self) -> None:
        self.last_line = time.monotonic()
        running = []
        for name in sorted(self.left):
            journal = self.plan.run_folder(name) / WORKER_FILE
            steps = [record for record in read(journal)[0] if record["kind"] == "train"]
            if steps and time.time() - steps[-1]["time"] < LINE_EVERY_S:
                last = steps[-1]
                running.append(
                    f"{name} step {last['step']}, loss {last['train_loss']:.3f}, {last['tokens_per_s']:,.0f} tokens/s"
                )
        if running:
            log.info("; ".join(running))
