import subprocess
import sys


def test_every_protection_is_compared_with_bare_sockets():
    command = [sys.executable, "-m", "experiments.bench_transport", "--sizes=2000", "--rounds=1", "--turn_s=0.01"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == ["authentication off", "authentication", "TLS", "authentication and TLS"]
    assert all(row[1] == "2000" and float(row[3]) > 0 and float(row[5]) > 0 for row in rows)
