import subprocess
import sys


def test_both_tables_have_all_points():
    flags = ["--points=64x2x8", "--microbatches=1,2", "--tokens=4", "--latencies_ms=0,5", "--seconds=1"]
    command = [sys.executable, "-m", "experiments.bench_overlap", *flags, "--rows=8", "--width=128", "--cores=0,0"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    balance, latency = rows[2:4], rows[6:]
    assert [row[:4] for row in balance] == [["64", "2", "8", n] for n in "12"]
    for step, tier1, tier2, host in (map(float, row[4:8]) for row in balance):
        assert min(tier1, tier2, host) > 0 and step >= tier2
    assert [row[0] for row in latency] == ["0", "5"]
    assert latency[0][2] == latency[0][4] == "1.00" and all(float(row[3]) > 0 for row in latency)
