"""SamplingParams: what is allowed, what is refused and how it says so, and the canonical dict."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hetero_jax.errors import SamplingParamsError
from hetero_jax.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n=0; allowed: an integer from 1"),
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0"),
        ({"temperature": -0.1}, "temperature=-0.1; allowed: from 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -2}, "top_k=-2; allowed: an integer from -1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 0}, "top_p=0; allowed: more than 0 to 1"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"min_p": 2}, "min_p=2; allowed: from 0 to 1"),
        ({"seed": -2}, "seed=-2; allowed: an integer from 0"),
        ({"max_tokens": 0}, "max_tokens=0; allowed: an integer from 1"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9; allowed: at most max_tokens=8"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0; allowed: more than 0"),
        ({"presence_penalty": 3}, "presence_penalty=3; allowed: from -2 to 2"),
        ({"frequency_penalty": "much"}, "frequency_penalty='much'"),
        ({"stop": [""]}, "stop has an empty string"),
        ({"stop": [3]}, r"stop=\[3\]; allowed: a list of str"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "token id=-1"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {7.9: 1}}, "logit_bias={7.9: 1}; allowed: a map from token id"),
        ({"logit_bias": {"1": "2"}}, r"logit_bias\[1\]='2'"),
        ({"logit_bias": {1: 1000}}, r"logit_bias\[1\]=1000"),
        ({"ignore_eos": 1}, "ignore_eos=1; allowed: true or false"),
        ({"beam_width": 2}, "unknown sampling parameter 'beam_width'; allowed: n, temperature"),
    ],
)
def test_what_is_out_of_range_is_named_with_what_is_allowed(values, message):
    with pytest.raises(SamplingParamsError, match=message):
        SamplingParams.from_dict(values)


def test_a_row_is_laid_over_the_defaults():
    defaults = SamplingParams(max_tokens=64, temperature=0, stop=("a",))
    params = SamplingParams.from_dict({"temperature": 0.5, "top_p": 0.9}, defaults)
    assert (params.max_tokens, params.temperature, params.top_p, params.stop) == (64, 0.5, 0.9, ("a",))


def test_a_single_stop_string_and_json_keys_are_taken_as_vllm_takes_them():
    params = SamplingParams.from_dict({"stop": "END", "logit_bias": {"7": 1}, "top_k": -1, "stop_token_ids": [2]})
    assert (params.stop, dict(params.logit_bias), params.stop_token_ids) == (("END",), {7: 1.0}, (2,))


def test_seed_of_minus_one_is_none_as_in_vllm():
    assert SamplingParams(seed=-1) == SamplingParams(seed=None)


@pytest.mark.parametrize(("whole", "real"), [({"temperature": 2}, {"temperature": 2.0}), ({"stop": None}, {})])
def test_equal_parameters_have_equal_json_text(whole, real):
    assert json.dumps(SamplingParams(**whole).to_dict()) == json.dumps(SamplingParams(**real).to_dict())


def test_dict_holds_what_differs_from_the_defaults_and_gives_the_same_parameters_back():
    params = SamplingParams(temperature=0.5, stop=["x"], logit_bias={9: 1.0, 3: -1.0}, max_tokens=None)
    values = json.loads(json.dumps(params.to_dict()))
    assert values == {"temperature": 0.5, "stop": ["x"], "max_tokens": None, "logit_bias": {"3": -1.0, "9": 1.0}}
    assert SamplingParams.from_dict(values) == params
    assert SamplingParams().to_dict() == {}


def test_parameters_are_frozen_and_hashable():
    params = SamplingParams(logit_bias={1: 2.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(params) == hash(SamplingParams(logit_bias={1: 2.0}))
