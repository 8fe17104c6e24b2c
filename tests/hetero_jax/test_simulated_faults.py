"""Lost and returning workers under a virtual clock: the scheduler, and pools that remember what was written."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from hetero_jax import pools
from hetero_jax.scheduler_types import SchedulerConfig
from simulated_workers import PAGE, SimulatedWorker, Simulation


@dataclass
class _Disturber:
    """Lets workers join, drain and die at random; what has gone returns as another pool."""

    chance: random.Random
    simulation: Simulation
    losses: int = 0

    def join(self) -> None:
        chance = self.chance
        worker = SimulatedWorker(
            chance.randint(40, 90), chance.uniform(100, 500), lambda speed: speed * chance.uniform(0.5, 2)
        )
        pool = self.simulation.join(worker)
        if chance.random() < 0.5:
            self.simulation.at(chance.expovariate(1 / 4), lambda: self._drain(pool))
        self.simulation.at(chance.expovariate(1 / 10), lambda: self._die(pool))

    def _drain(self, pool: int) -> None:
        if self.simulation.drain(pool):
            self.simulation.at(5, self.join)

    def _die(self, pool: int) -> None:
        if self.simulation.die(pool):
            self.losses += 1
            self.simulation.at(self.chance.choice([0, 8, 30]), lambda: self._notice(pool))

    def _notice(self, pool: int) -> None:
        if self.simulation.notice(pool):
            self.simulation.at(self.chance.uniform(0, 60), self.join)


@pytest.mark.parametrize("seed", range(8))
def test_tokens_are_those_of_an_undisturbed_run_whatever_is_lost_and_when(seed, monkeypatch):
    monkeypatch.setattr(pools, "_COPY_COST", 4)  # so that pools are balanced among all that happens
    chance = random.Random(seed)
    limits = {"max_num_batched_tokens": 24, "max_num_seqs": 12, "num_microbatches": 3, "max_model_len": 200}
    simulation = Simulation(SchedulerConfig(page_size=PAGE, **limits))
    for seq_id in range(60):
        prompt = [chance.randrange(997) for _ in range(chance.randint(1, 60))]
        simulation.add(seq_id, prompt, chance.randint(1, 50))
    expected = simulation.expected()
    disturber = _Disturber(chance, simulation)
    for _ in range(3):
        simulation.at(0, disturber.join)
    simulation.run()
    assert simulation.tokens == expected and len(simulation.done) == 60
    assert disturber.losses > 2 and simulation.scheduler.num_replays > 2 and len(simulation.moves) > 1
