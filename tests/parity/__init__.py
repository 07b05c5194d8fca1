"""The parity harness: every command reads the same ids, computes the same logits and writes the same text, or refuses.

`python -m tests.parity --out FOLDER` writes two tables; `pytest -m slow tests/parity` fails on any fault in them.

- `text`             ids and text: tokenizers x what they put around a text x chat templates, every pair
- `weights`          losses, logits, text: families x bases x adapters x tokenizers x export formats, every pair of them
- `tokenizer_kinds`, `bases`, `adapters`   the axes' values; a new one is a row there
- `pairwise`, `table`, `harness`   few combinations for all pairs, what was found, and running all of it

`test_axes` fails where a family, scheme, start or setting that finhpc or peft has is missing among the axes.
"""
