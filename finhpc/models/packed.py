"""How examples of different lengths travel through the pipeline: side by side in one row, each blind to the others.

A pack is int64 (1, FIELDS, T): T tokens, and what is said of each. A token sees the tokens before it, and itself, of
its own segment, and all of the segment it continues: a prefix that several examples share is there, and
computed, once. Without dropout that is exact.
"""

from __future__ import annotations

TOKEN = 0  # id
POSITION = 1  # place in its own example, from 0: what the model's positions are made of
SEGMENT = 2  # number of its segment, from 1; the tokens of a segment lie together; 0: padding
PREFIX = 3  # number of the segment that comes before its own; 0: none
TARGET = 4  # id that it is to predict, or IGNORED
TARGETS = 5  # targets of the whole step or evaluation, over all packs; the same number everywhere
PACKS = 6  # packs of the whole step or evaluation, over all replicas; the same number everywhere
FIELDS = 7

IGNORED = -100
