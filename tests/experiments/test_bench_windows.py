import subprocess
import sys


def test_more_sequences_run_at_once_where_most_layers_have_a_window():
    flags = ["--sequences=7", "--context=700", "--tokens=16", "--window=64", "--fitting=3", "--heads=2"]
    command = [sys.executable, "-m", "experiments.bench_windows", *flags]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    none, most = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4])
    assert none[1:3] == [most[1], "3"] and int(most[2]) >= 5
