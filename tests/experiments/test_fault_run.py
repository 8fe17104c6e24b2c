"""A few points of the fault run, which itself compares byte for byte with an undisturbed run."""

import os
import subprocess
import sys


def test_faults_of_workers_and_engine_change_no_byte():
    # Which faults these are depends on how far the job has come when their moments do.
    command = [sys.executable, "-m", "experiments.fault_run", "--points=2", "--rows=12", "--seed=10"]
    command += ["--kv_partition=head"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 faults (" in done.stdout and "OK: 0 rows lost, 0 doubled" in done.stdout
