"""Writes the tables: `python -m tests.parity --out FOLDER [--only text|weights] [--every N]`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.parity.harness import run_texts, run_weights
from tests.parity.table import Row, Table
from tests.parity.tokenizer_kinds import tokenizer_pairs
from tests.parity.weights import combinations


def main() -> int:
    words = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    words.add_argument("--out", type=Path, required=True, help="folder for text.md, weights.md and their .csv")
    words.add_argument("--only", choices=("text", "weights"), help="one of the two tables")
    words.add_argument("--every", type=int, default=1, help="every Nth combination alone")
    words.add_argument("--match", default="", help="combinations with this text in one of their values alone")
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as made:
        tables: dict[str, Table] = {}
        begin = time.monotonic()
        if given.only != "weights":
            kinds = [kind for kind in tokenizer_pairs() if given.match in str(kind)]
            tables["text"] = run_texts(kinds[:: given.every], Path(made), say)
        if given.only != "text":
            chosen = [one for one in combinations() if given.match in " | ".join(one.values())]
            tables["weights"] = run_weights(chosen[:: given.every], Path(made), say)
    faults = []
    for name, table in tables.items():
        table.write(given.out, name)
        faults += table.faults()
        print(f"\n{table.title}: {len(table.rows)} rows\n", *table.summary(), sep="\n")
    print(f"\n{time.monotonic() - begin:.0f} s", *faults, sep="\n")
    return 1 if faults else 0


def say(row: Row) -> None:
    print("\n".join(row.faults()) or ".", end="\n" if row.faults() else "", flush=True)


sys.exit(main())
