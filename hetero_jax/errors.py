"""Errors of the engine and the job.

HeteroJaxError                 anything this package raises on purpose
|-- ConfigError                a configuration that does not fit the model or the machine
|-- CheckpointError            a checkpoint that is damaged, or of other parameters than the plan's
|-- RequestError               a request that cannot run
|   |-- SamplingParamsError    a sampling parameter out of range, or a combination that has no meaning
|   `-- CapacityError          longer than the model or the KV pool allows
|-- WorkerError                a worker that is not there, refuses, fails or was lost
`-- JobError                   a job that cannot start or go on: input, output file, lock
"""

from __future__ import annotations


class HeteroJaxError(Exception):
    """Base class; the message says what was seen and what is allowed."""


class ConfigError(HeteroJaxError):
    """A configuration that does not fit the model or the machine."""


class CheckpointError(HeteroJaxError):
    """A checkpoint that is damaged, or of other parameters than the plan's; the message begins with its path."""


class RequestError(HeteroJaxError):
    """A request that cannot run."""


class SamplingParamsError(RequestError):
    """A sampling parameter out of range, or a combination that has no meaning."""


class CapacityError(RequestError):
    """A sequence longer than the model or the whole KV pool allows."""


class WorkerError(HeteroJaxError):
    """A worker that is not there, refuses, fails or was lost; the message begins with its address."""


class JobError(HeteroJaxError):
    """A job that cannot start or go on: bad input rows, an output file of another job, a lock."""
