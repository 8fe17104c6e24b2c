"""Requests, samples and completions."""

from __future__ import annotations

import json

import pytest

from hetero_jax.errors import RequestError
from hetero_jax.outputs import Completion, Request, Sample


@pytest.mark.parametrize(
    ("kinds", "message"),
    [({}, "no prompt"), ({"prompt": "a", "prompt_token_ids": (1,)}, "prompt and prompt_token_ids")],
)
def test_a_request_has_exactly_one_kind_of_prompt(kinds, message):
    with pytest.raises(RequestError, match=message):
        Request(id="a", **kinds)


def _sample(index: int, **more) -> Sample:
    return Sample(index=index, text="hi", token_ids=(1, 2), finish_reason="stop", **more)


def test_row_of_one_sample():
    sample = _sample(0, stop_reason=5, logprobs=({1: -0.5}, {2: -1.0}))
    row = Completion(id="a", prompt_token_ids=(7, 8, 9), outputs=(sample,)).to_row()
    assert json.loads(json.dumps(row)) == {
        "id": "a",
        "text": "hi",
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "stop_reason": 5,
        "logprobs": [{"1": -0.5}, {"2": -1.0}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_row_of_several_samples_holds_them_all_and_counts_their_tokens():
    row = Completion(id="a", prompt_token_ids=(7,), outputs=(_sample(0), _sample(1))).to_row()
    assert [output["index"] for output in row["outputs"]] == [0, 1]
    assert row["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}


def test_repr_says_what_came_out_or_what_was_wrong():
    assert repr(Completion(id="a", prompt_token_ids=(7,), outputs=(_sample(0),))) == (
        "Completion('a', 'hi', 2 tokens, stop)"
    )
    assert "too long" in repr(Completion(id="a", prompt_token_ids=(), outputs=(_sample(0),), error="too long"))
