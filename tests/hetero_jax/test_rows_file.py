"""Input rows: every line is either a row or a bad row, whatever it holds; ids stay apart; keys tell outputs apart."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_jax.rows_file import read_rows
from hetero_jax.sampling_params import SamplingParams

IDS = st.sampled_from(["a", "1", 1, "line:1", "line:2", None, ""])  # few, so that they meet
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["", "a", "line:1", "line:2"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "top_p", "n"]), inner),
    max_leaves=4,
)
FIELDS = dict.fromkeys(("messages", "prompt_token_ids", "sampling_params", "other"), VALUES)
ROWS = st.fixed_dictionaries({"id": IDS}, optional={"prompt": st.just("a"), **FIELDS})
JUNK = st.binary(max_size=12).filter(lambda line: b"\n" not in line)
LINES = ROWS.map(lambda row: json.dumps(row).encode()) | JUNK


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(LINES, max_size=5))
def test_every_line_is_reported_once_under_an_id_of_its_own(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "rows"
    path.write_bytes(b"\n".join(lines))
    rows, bad = read_rows(path, SamplingParams(), {})
    ids = [str(row.id) for row in (*rows, *bad)]
    assert len(ids) == sum(bool(line.strip()) for line in lines)
    assert len(set(ids)) == len(ids)
    assert all(row.error and lines[row.line - 1].strip() for row in bad)


def test_a_second_row_of_an_id_is_reported_under_its_line(tmp_path):
    lines = ('{"id": 7, "prompt": "a"}', '{"id": "7", "prompt": "b"}', '{"id": "b"}', '{"id": "b", "prompt": "c"}')
    (tmp_path / "in").write_text("\n".join(lines))
    rows, bad = read_rows(tmp_path / "in", SamplingParams(), {})
    assert [row.id for row in rows] == [7]
    assert [(row.line, row.id) for row in bad] == [(2, "line:2"), (3, "b"), (4, "line:4")]


ROW = {"id": "1", "prompt": "a", "sampling_params": {"temperature": 0, "logit_bias": {"2": 1, "1": 1}}}


def _key(path, row, defaults=None, context=None, before="") -> str:
    path.write_text(before + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    rows, _ = read_rows(path, defaults or SamplingParams(), context or {"model": "a", "seed": 0})
    return rows[-1].key


def test_how_a_row_is_written_and_where_it_stands_is_not_in_its_key(tmp_path):
    params = ROW["sampling_params"]
    same = [
        json.dumps(ROW, indent=None, separators=(", ", " :  ")),
        '{"prompt": "\\u0061", "sampling_params": {"logit_bias": {"1": 1.0, "2": 1}, "temperature": 0.0}, "id": "1"}',
        {**ROW, "sampling_params": {**params, "max_tokens": 16, "stop": None, "stop_token_ids": []}},
    ]
    key = _key(tmp_path / "in", ROW)
    assert [_key(tmp_path / "in", row) for row in same] == [key] * len(same)
    assert _key(tmp_path / "in", ROW, before='\n{"id": "0", "prompt": "x"}\nbad\n') == key
    assert _key(tmp_path / "in", ROW, context={"seed": 0, "model": "a"}) == key
    assert _key(tmp_path / "in", ROW, defaults=SamplingParams(temperature=0.5)) == key  # the row's own value wins


def test_what_the_output_depends_on_is_in_the_key(tmp_path):
    params = ROW["sampling_params"]
    others = [
        {**ROW, "id": "2"},
        {**ROW, "prompt": "a "},
        {"id": "1", "prompt_token_ids": [97], "sampling_params": params},
        {"id": "1", "messages": [{"role": "user", "content": "a"}], "sampling_params": params},
        *({**ROW, "sampling_params": {**params, **change}} for change in _CHANGES),
    ]
    keys = [_key(tmp_path / "in", row) for row in (ROW, *others)]
    keys += [_key(tmp_path / "in", ROW, context=context) for context in ({"model": "b", "seed": 0}, {"model": "a"})]
    keys.append(_key(tmp_path / "in", ROW, defaults=SamplingParams(max_tokens=17)))
    assert len(set(keys)) == len(keys)


_CHANGES = (
    {"n": 2, "temperature": 1},
    {"temperature": 0.1},
    {"top_k": 1},
    {"top_p": 0.5},
    {"min_p": 0.5},
    {"seed": 0},
    {"stop": ["x"]},
    {"stop_token_ids": [1]},
    {"ignore_eos": True},
    {"max_tokens": 15},
    {"min_tokens": 1},
    {"logprobs": 0},
    {"repetition_penalty": 2},
    {"presence_penalty": 1},
    {"frequency_penalty": 1},
    {"logit_bias": {"1": 1}},
)


def test_every_sampling_parameter_is_among_the_changes():
    assert {name for change in _CHANGES for name in change} == set(SamplingParams.__dataclass_fields__)
