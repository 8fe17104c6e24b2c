import subprocess
import sys


def test_both_placements_have_their_row_and_the_slow_worker_is_given_its_part():
    flags = ["--sequences=4", "--context=128", "--heads=2", "--running=0.9", "--cores=0,0"]
    command = [sys.executable, "-m", "experiments.bench_balance", *flags]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    even, by_speed = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4])
    assert (even[0], by_speed[0]) == ("even", "by speed")
    assert 0.48 <= float(even[1]) <= 0.52 and even[-1] == "1.00"  # room for two sequences each
    for _, _, step_ms, slow_ms, fast_ms, _ in (even, by_speed):
        assert float(step_ms) >= 0.99 * max(float(slow_ms), float(fast_ms)) > 0
    assert "sequences moved" in lines[-1]
