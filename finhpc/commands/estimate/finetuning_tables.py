"""An estimate of a finetuning on the screen: memory by stage, by bits, and beside the paper's Table IX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finhpc.commands.estimate.tables import gb, stage_rows
from finhpc.planning.devices import Cluster
from finhpc.screen import rows_table, summary_table
from finhpc.settings.estimate import FinetuneEstimateConfig

Rows = list[dict[str, Any]]


def show(config: FinetuneEstimateConfig, cluster: Cluster, result: dict[str, Any]) -> None:
    """Everything that `finhpc estimate finetune` found, on stderr."""
    numbers, work = result["estimate"], config.estimate
    rows_table("memory of a worker by stage in GB", stage_rows(numbers["stages"]))
    rows_table("by quantization.bits, the fullest stage", _bits_rows(numbers["by_bits"]))
    rows_table("Table IX beside the same adapters here (GB)", _ix_rows(numbers["table_ix"]))
    parallel = config.parallel
    rows = [
        ("base", f"{(result['params_total'] - result['params_trainable']) / 1e6:,.2f} M parameters"),
        ("trained", f"{result['params_trainable'] / 1e6:,.2f} M"),
        ("a step", f"{numbers['step_s']:,.3g} s, {numbers['operations_per_step'] / 1e12:,.3g} TFLOP, rough: at "
         f"{cluster.reached:.0%} of {cluster.device.name}'s matrix rate"),
        ("of", f"{parallel.samples_per_step} examples of {work.tokens} tokens, {work.answer} of them answers, "
         f"{work.shared} shared by {parallel.micro_batch_size}"),
        ("tokens/s", f"{numbers['tokens_per_s']:,.0f} (estimated)"),
        ("pipeline bubble", f"{numbers['pipeline_bubble']:.1%} with even stages"),
    ]  # fmt: skip
    summary_table("estimate of a finetuning", rows)
    if numbers["table_ix"]:
        rows_table("where the paper's table and the arithmetic disagree", numbers["differences"])


def _bits_rows(found: Sequence[dict[str, Any]]) -> Rows:
    return [
        {
            "bits": row["bits"],
            "scheme": row["scheme"],
            "base GB": gb(row["base_bytes"]),
            "peak GB": gb(row["peak_bytes"]),
            "fits": "yes" if row["fits"] else "no",
            "step s": f"{row['step_s']:,.3g}",
            "tokens/s": f"{row['tokens_per_s']:,.0f}",
        }
        for row in found
    ]


def _ix_rows(found: Sequence[dict[str, Any]]) -> Rows:
    return [
        {
            "rank": row["rank"],
            "bits": row["bits"],
            "trained M": f"{row['params_trainable'] / 1e6:.2f}",
            "(paper)": f"{row['trained_m']}",
            "base": gb(row["base_bytes"]),
            "(paper) ": f"{row['model_gb']}",
            "peak": gb(row["peak_bytes"]),
            "(paper)  ": f"{row['memory_gb']}",
            "beyond base": gb(row["peak_bytes"] - row["base_bytes"]),
            "(paper)   ": f"{row['memory_gb'] - row['model_gb']:.1f}",
        }
        for row in found
    ]
