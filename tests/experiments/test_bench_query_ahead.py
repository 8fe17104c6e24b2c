import subprocess
import sys


def test_every_wire_and_depth_has_a_row():
    flags = ["--gbit_per_s=0.1,inf", "--microbatches=1", "--sequences=2", "--context=8", "--tokens=32", "--heads=2"]
    command = [sys.executable, "-m", "experiments.bench_query_ahead", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in rows[2:]] == [["0.1", "1"], ["inf", "1"]]
    assert all(float(ms) > 0 for row in rows[2:] for ms in row[2:])
