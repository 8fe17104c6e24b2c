"""Workers of several speeds under a virtual clock, against the time of an ideal split: all positions by all speeds."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hetero_jax.scheduler_types import SchedulerConfig
from simulated_workers import PAGE, SimulatedWorker, Simulation

SPEEDS = (100.0, 200.0, 400.0)


def _simulation(num_sequences: int, *, max_num_seqs: int, tokens: tuple[int, int]) -> Simulation:
    limits = {"max_num_batched_tokens": 256, "num_microbatches": 2, "max_model_len": 400}
    simulation = Simulation(SchedulerConfig(page_size=PAGE, max_num_seqs=max_num_seqs, **limits))
    chance = random.Random(1)
    for seq_id in range(num_sequences):
        prompt = [chance.randrange(997) for _ in range(chance.randint(1, 30))]
        simulation.add(seq_id, prompt, chance.randint(*tokens))
    return simulation


def _noisy(chance: random.Random):
    return lambda speed: speed * chance.uniform(0.95, 1.05)


def _watch(simulation: Simulation, seen: list[np.ndarray]) -> None:
    """Note the share of each pool's positions every 2 seconds."""

    def look() -> None:
        loads = simulation.loads()
        seen.append(np.array([loads[pool] for pool in sorted(simulation.workers)], float))
        simulation.at(2.0, look)

    simulation.at(0.0, look)


@pytest.mark.parametrize("measured", [True, False])
def test_positions_are_shared_in_proportion_to_speeds(measured):
    """A queue of sequences that start where others end."""
    chance, seen = random.Random(0), []
    simulation = _simulation(120, max_num_seqs=36, tokens=(100, 300))
    for speed in SPEEDS:
        simulation.join(SimulatedWorker(1000, speed, _noisy(chance) if measured else lambda speed: None))
    _watch(simulation, seen)
    simulation.run()
    assert simulation.tokens == simulation.expected()
    inner = [loads / loads.sum() for loads in seen[len(seen) // 4 : len(seen) * 3 // 4]]
    ideal = np.array(SPEEDS) / sum(SPEEDS) if measured else np.full(3, 1 / 3)
    np.testing.assert_allclose(np.mean(inner, axis=0), ideal, atol=0.02)
    # An even split takes as long as the slowest worker needs for a third: 7/3 of the ideal.
    ratio = simulation.now_s / (simulation.reads / sum(SPEEDS))
    assert (ratio < 1.1) if measured else (ratio > 2.0)


def _remaining_ratio(change) -> tuple[float, Simulation]:
    """Time of a job behind a change at its tenth second, by that of an ideal split from there on."""
    simulation = _simulation(40, max_num_seqs=40, tokens=(150, 200))
    chance = random.Random(0)
    for _ in range(2):
        simulation.join(SimulatedWorker(4000, 2000.0, _noisy(chance)))
    at: list[float] = []

    def happen() -> None:
        change(simulation, _noisy(chance))
        at.extend((simulation.now_s, simulation.reads))

    simulation.at(10.0, happen)
    simulation.run()
    assert simulation.tokens == simulation.expected()
    assert simulation.scheduler.num_replays == simulation.scheduler.num_preemptions == 0
    now_s, reads = at
    ideal_s = (simulation.reads - reads) / sum(worker.speed for worker in simulation.workers.values())
    return (simulation.now_s - now_s) / ideal_s, simulation


def test_a_worker_that_joins_takes_running_sequences():
    """Without moves it would stay idle, as nobody waits: 3 times the ideal."""
    ratio, simulation = _remaining_ratio(lambda sim, noisy: sim.join(SimulatedWorker(4000, 8000.0, noisy)))
    assert ratio < 1.3
    assert len(simulation.moves) < 1.5 * 40 * 8 / 12


def test_a_worker_that_becomes_slow_gives_running_sequences_away():
    """Without moves its half takes it 2.5 times the ideal."""

    def slow_down(simulation: Simulation, noisy) -> None:
        simulation.workers[min(simulation.workers)].speed /= 4

    ratio, simulation = _remaining_ratio(slow_down)
    assert ratio < 1.3
    assert len(simulation.moves) < 1.5 * 40 * (1 / 2 - 1 / 5)
