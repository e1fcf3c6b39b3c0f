"""Names the rules by which weights are chosen; apart from the records, so that configurations needn't import NumPy."""

from __future__ import annotations

from typing import Literal

SelectionRule = Literal["last", "mean_last", "source_val", "target_oracle"]
