"""The reference tokens of SmolLM2-135M-Instruct (f32, an independent implementation) and how to compare with them."""

from __future__ import annotations

import json
from pathlib import Path

GOLDEN = Path(__file__).parent.parent / "data" / "smollm2_135m_greedy.jsonl"
# Where the first and the second choice are closer than this, either may win in f32.
NEAR_TIE = 1e-3


def golden_rows() -> list[dict]:
    """Rows with id, prompt_ids, greedy_ids, top2_gap, and prompt or messages."""
    return [json.loads(line) for line in GOLDEN.read_text().splitlines()]


def first_difference(row: dict, token_ids) -> int | None:
    """Index of the first token that differs for another reason than a near tie; None if there is none."""
    for index, (seen, expected) in enumerate(zip(token_ids, row["greedy_ids"], strict=True)):
        if seen != expected:
            return None if row["top2_gap"][index] < NEAR_TIE else index
    return None
