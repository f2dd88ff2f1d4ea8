"""Options that make a benchmark small."""

from __future__ import annotations

SMALL = [
    *("--epochs", "2", "--batch-size", "4", "--set", "data.height=32", "--set", "data.width=64"),
    *("--set", "data.num_train=16", "--set", "data.num_val=6", "--set", "data.holdout=0.25"),
    *("--protocol", "holdout", "--seeds", "1", "--pictures", "2"),
]
