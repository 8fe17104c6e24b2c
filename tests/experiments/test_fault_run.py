"""A few points of the fault run, which itself compares byte for byte with an undisturbed run."""

import os
import subprocess
import sys


def test_faults_of_workers_and_engine_change_no_byte():
    # This seed has a fault of each kind among the first three.
    command = [sys.executable, "-m", "experiments.fault_run", "--points=3", "--rows=24", "--seed=16"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 faults (" in done.stdout and "OK: 0 rows lost, 0 doubled" in done.stdout
