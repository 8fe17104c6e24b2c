import subprocess
import sys


def test_the_table_has_all_points():
    flags = ["--sequences=2", "--context=40", "--tokens=20", "--kv_cache_bytes=67108864"]
    command = [sys.executable, "-m", "experiments.bench_kv_partition", *flags]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in rows[2:]] == [["sequence", "2"], ["head", "2"]]
    assert all(float(row[2]) > 0 for row in rows[2:])
