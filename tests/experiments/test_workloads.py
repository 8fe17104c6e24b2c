from __future__ import annotations

import statistics

import pytest

from experiments.workloads import RequestLengths, load_workload

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


# The means of the whole traces (19,366 and 8,819 rows) are 1155 / 211 and 2048 / 28 tokens.
@pytest.mark.parametrize(("name", "prompt_mean", "output_mean"), [("conv", 1155, 211), ("code", 2048, 28)])
def test_samples_keep_the_lengths_of_the_whole_trace(name: str, prompt_mean: float, output_mean: float) -> None:
    workload = load_workload(name)
    assert len(workload) == 500
    assert statistics.mean(r.prompt_tokens for r in workload) == pytest.approx(prompt_mean, rel=0.05)
    assert statistics.mean(r.output_tokens for r in workload) == pytest.approx(output_mean, rel=0.2)
    assert workload[0].arrival_s == 0.0
    assert 3400 < workload[-1].arrival_s < 3600  # an hour of service


def test_a_file_is_read_up_to_the_limit(tmp_path) -> None:
    path = tmp_path / "trace.csv"
    rows = ["2023-11-16 23:59:59.7500000,374,44\n", "2023-11-17 00:00:01.0000000,1,1\n", "not read,0,0\n"]
    path.write_text(HEADER + "".join(rows))
    assert load_workload(path, limit=2) == (
        RequestLengths(arrival_s=0.0, prompt_tokens=374, output_tokens=44),
        RequestLengths(arrival_s=1.25, prompt_tokens=1, output_tokens=1),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: columns \(\)"),
        ("time,in,out\n", r"line 1: columns .*'in'.* expected .*'ContextTokens'"),
        (HEADER + "2023-11-16 18:00:00.0,1\n", "line 2: 2 fields, expected 3"),
        (HEADER + "2023-11-16 18:00:00.0,1,0\n", r"line 2: token counts \[1, 0\], expected at least 1"),
        (HEADER + "2023-11-16 18:00:00.0,many,1\n", "line 2: .*'many'"),
        (HEADER + "2023-11-16 18:00:01.0,1,1\n2023-11-16 18:00:00.0,1,1\n", "line 3: .* is before the row above"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_workload(path)
