"""The command line, end to end on a tiny random model, and what it says when asked wrongly."""

from __future__ import annotations

import errno
import json

import pytest

from hetero_jax.cli import main, parse_bytes
from hetero_jax.errors import ConfigError
from hetero_jax.output_file import OutputFile


def _cli(capsys, *args) -> tuple[int, str, str]:
    code = main(["hetero-jax", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [{"id": n, "prompt_token_ids": [n + 1, 2, 3]} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _tokens(path) -> dict:
    return {row["id"]: row["token_ids"] for row in map(json.loads, path.read_text().splitlines())}


SMALL = ("--kv_cache_bytes=1M", "--max_model_len=64", "--max_tokens=4", "--temperature=0")


@pytest.mark.parametrize("args", [(), ("--help",), ("help",)])
def test_overview(capsys, args):
    code, out, _ = _cli(capsys, *args)
    assert code == 0
    assert "hetero-jax generate --model=MODEL --input=prompts.jsonl" in out


@pytest.mark.parametrize(
    ("command", "flag"), [("generate", "--on_error"), ("convert", "--output"), ("plan", "--kv_cache_bytes")]
)
def test_help_of_a_command_lists_its_flags(capsys, command, flag):
    code, out, _ = _cli(capsys, command, "--help")
    assert code == 0
    assert flag in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("serve",), "unknown command 'serve'; allowed: generate, worker, convert, plan"),
        (("plan",), "exactly one of the two"),
        (("plan", "--model=random:tiny", "--module=small_model:build"), "exactly one of the two"),
        (("plan", "--module=small_model"), "allowed: package.module:function"),
        (("plan", "--module=small_model:nothing"), "allowed: package.module:function"),
        (("plan", "--module=no.such.module:build"), "No module named 'no'"),
        (("plan", "--model=random:tiny", "--temprature=1"), "temprature"),
        (("plan", "--model=random:tiny", "more"), "unexpected argument 'more'"),
        (("plan", "--model=/no/such/model"), "/no/such/model"),
        (("plan", "--model=random:none"), "no shape is called 'none'"),
        (("plan", "--model=random:tiny", "--kv_cache_bytes=lots"), "kv_cache_bytes='lots'"),
        (("plan", "--model=random:tiny", "--max_num_seqs=0"), "max_num_seqs=0"),
    ],
)
def test_mistakes_are_one_clear_message_and_exit_code_1(capsys, args, message):
    code, _, err = _cli(capsys, *args)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1, err


def test_generate_then_rerun(capsys, tmp_path, prompts):
    args = ("generate", "--model=random:tiny", f"--input={prompts}", f"--output={tmp_path / 'out'}", *SMALL)
    code, _, err = _cli(capsys, *args)
    assert code == 0, err
    before = (tmp_path / "out").read_bytes()
    assert sorted(_tokens(tmp_path / "out")) == [0, 1, 2, 3, 4]
    code, _, err = _cli(capsys, *args)
    assert code == 0
    assert "5 of 5 rows are done already" in err
    assert (tmp_path / "out").read_bytes() == before


def test_a_prompt_that_needs_a_tokenizer_fails_alone(capsys, tmp_path, prompts):
    with prompts.open("a") as file:
        file.write('{"id": "text", "prompt": "Hello"}\n')
    args = ("generate", "--model=random:tiny", f"--input={prompts}", f"--output={tmp_path / 'out'}", *SMALL)
    assert _cli(capsys, *args)[0] == 2
    assert len(_tokens(tmp_path / "out")) == 6


def test_a_full_disk_is_one_message_and_the_job_goes_on_later(capsys, tmp_path, prompts, monkeypatch):
    args = ("generate", "--model=random:tiny", f"--input={prompts}", f"--output={tmp_path / 'out'}", *SMALL)
    append, rows = OutputFile.append, []

    def until_full(self, row):
        if len(rows) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        rows.append(row)
        append(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "append", until_full)
        code, _, err = _cli(capsys, *args)
    assert code == 1
    assert "No space left on device" in err
    assert len(_tokens(tmp_path / "out")) == 2
    assert _cli(capsys, *args)[0] == 0
    assert sorted(_tokens(tmp_path / "out")) == [0, 1, 2, 3, 4]


def test_on_error_fail_ends_the_job_at_a_prompt_that_is_too_long(capsys, tmp_path, prompts):
    with prompts.open("a") as file:
        file.write(json.dumps({"id": "long", "prompt_token_ids": [1] * 100}) + "\n")
    args = ("generate", "--model=random:tiny", f"--input={prompts}", f"--output={tmp_path / 'out'}", *SMALL)
    code, _, err = _cli(capsys, *args, "--on_error=fail")
    assert code == 1
    assert "request 'long'" in err
    assert (tmp_path / "out").read_bytes() == b""
    assert _cli(capsys, *args)[0] == 2


def test_converted_checkpoint_gives_the_same_tokens(capsys, tmp_path, prompts):
    folder = tmp_path / "checkpoint"
    assert _cli(capsys, "convert", "--model=random:tiny", f"--output={folder}")[0] == 0
    for model, output in (("random:tiny", "a"), (folder, "b")):
        args = ("generate", f"--model={model}", f"--input={prompts}", f"--output={tmp_path / output}", *SMALL)
        assert _cli(capsys, *args)[0] == 0
    assert _tokens(tmp_path / "a") == _tokens(tmp_path / "b")


def test_plan_of_a_builder_is_printed_and_drawn(capsys, tmp_path, monkeypatch):
    text = "from small_model import SmallModel\ndef build():\n    return SmallModel(), SmallModel().params()\n"
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    code, out, _ = _cli(capsys, "plan", "--module=mine:build", "--max_model_len=64", "--draw=plan.svg")
    assert code == 0
    assert "3 dense stages and 2 attention sites" in out
    assert "6 heads over 2 kv heads" in (tmp_path / "plan.svg").read_text()


def test_plan_prints_stages_and_sites(capsys):
    code, out, _ = _cli(capsys, "plan", "--model=random:tiny", "--kv_cache_bytes=1M")
    assert code == 0
    assert "3 dense stages and 2 attention sites" in out
    assert "4 heads over 2 kv heads of 16" in out


@pytest.mark.parametrize(
    ("text", "size"), [("1024", 1024), ("2G", 2 << 30), ("1.5MiB", 3 << 19), ("64k", 65536), ("3 Gi", 3 << 30)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1I", "nan", "0", "1e999"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        parse_bytes(text)
