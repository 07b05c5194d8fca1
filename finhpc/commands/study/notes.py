"""What a reader of a study must mind: best rates at an edge, a reference that got worse, repeated text, a busy machine.

Each note is a sentence or two with the figures.
"""

from __future__ import annotations

from typing import Any

from finhpc.commands.study.compare import Compared, at
from finhpc.commands.study.trained import Trained
from finhpc.settings.sweep import StudyConfig

Row = dict[str, Any]
QUIET = 0.2  # the largest relative spread of step times at which their median is reliable


def edge_notes(tuning: list[Row]) -> list[str]:
    """A note per variant whose best learning rate is at an edge of those that were tried, or that has none."""
    notes = []
    for row in tuning:
        if row["lr"] is None:
            notes.append(f"{row['variant']} diverged at every rate tried: {', '.join(f'{lr:g}' for lr in row['lrs'])}.")
        elif row["lr_edge"] == "only":
            notes.append(f"{row['variant']}: lr {row['lr']:g} is the only one tried; another one may be better.")
        elif row["lr_edge"]:
            beyond = "lower" if row["lr_edge"] == "lowest" else "higher"
            notes.append(
                f"{row['variant']}: its best lr {row['lr']:g} is the {row['lr_edge']} of the {len(row['lrs'])} tried; "
                f"a {beyond} one may be better (raise study.widen)."
            )
    return notes


def reference_notes(screened: list[Trained], reference: Compared) -> list[str]:
    """A note if the reference's final runs never get as low as its own screening did, on fewer tokens or as many.

    Their spread over the seeds is allowed for. At equal tokens a longer final run is often above the screening, because
    its learning rate has not fallen yet; so its whole curve counts.
    """
    own = [run for run in screened if (run.variant, run.lr) == (reference.name, reference.runs[0].lr) and run.curve]
    if not own or own[0].config.train.steps > reference.steps:
        return []
    earlier, lowest, losses = own[0], min(reference.curve.values()), [run.loss for run in reference.runs]
    spread = max(losses) - min(losses)
    if lowest <= earlier.loss + spread:
        return []
    step, end = earlier.config.train.steps, reference.curve[reference.steps]
    return [
        f"{reference.name} does not reach its own earlier loss: its screening at lr {earlier.lr:g} ended at "
        f"{earlier.loss:.3f} after {step * earlier.tokens_per_step:,} tokens; its final runs at the same rate are at "
        f"{at(reference.curve, step):.3f} there and end at {end:.3f} (lowest {lowest:.3f}, spread {spread:.3f}). Do "
        "not trust comparisons with it: lower its learning rates, or screen on more steps."
    ]


def final_notes(config: StudyConfig, rows: list[Row]) -> list[str]:
    """Notes on the text that was repeated, on how much was held out, and on the measured times."""
    notes = []
    if repeated := [f"{row['variant']} {row['epochs']:.1f}" for row in rows if row["epochs"] > 1]:
        notes.append(f"the finals read the training text more than once (epochs: {', '.join(repeated)}).")
    scored = rows[0]["final_val_tokens"]
    if scored < config.study.final_tokens:
        notes.append(
            f"the whole held-out split was scored, {scored:,} tokens, which is less than "
            f"study.final_tokens={config.study.final_tokens:,}; hold out more text (prepare --val_fraction)."
        )
    if max(row["step_s_spread"] for row in rows) > QUIET:
        notes.append("the machine was busy while step times were measured; the same command measures them again.")
    return notes
