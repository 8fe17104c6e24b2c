import re
import subprocess
import sys


def test_strangers_come_and_calls_are_served_beside_them():
    command = [sys.executable, "-m", "experiments.bench_slow_peers", "--peers=20", "--rounds=1", "--turn_s=0.1"]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.fullmatch(
        r"20 peers of 1 byte/s: a call takes ([\d.]+) of .*; (\d+) connections in the last turn\n", line
    )
    assert found is not None, line
    assert float(found[1]) > 0 and int(found[2]) >= 20
