import subprocess
import sys


def test_both_tables_have_all_points():
    flags = ["--contexts=16", "--latencies_ms=0,5", "--sequences=4", "--tokens=6", "--seconds=1", "--rows=8"]
    command = [sys.executable, "-m", "experiments.bench_overlap", *flags, "--hidden=128,128", "--cores=0,0"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    balance, latency = rows[2:4], rows[6:]
    assert [row[:2] for row in balance] == [["16", "1"], ["16", "2"]]
    assert all(float(step) >= 0.99 * max(float(first), float(second)) for _, _, step, first, second, *_ in balance)
    assert [row[0] for row in latency] == ["0", "5"]
    assert latency[0][2] == latency[0][4] == "1.00" and all(float(row[3]) > 0 for row in latency)
