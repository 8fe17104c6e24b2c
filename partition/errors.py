"""Errors of the partitioner.

PartitionError                 anything this package raises on purpose
|-- TraceError                 the function could not be traced as a causal language model
|-- TokenMixingError           an equation outside attention combines or moves positions
|-- UnsupportedPrimitiveError  a primitive without a rule (fail closed)
`-- UnsupportedSiteError       an attention operator that is not one we can run exactly
"""

from __future__ import annotations


class PartitionError(Exception):
    """Base class: the model cannot be partitioned; the message says what was seen and what is allowed."""


class TraceError(PartitionError):
    """The function is not a causal language model over `[1, T]` tokens that can be traced at any T."""


class TokenMixingError(PartitionError):
    """An equation outside an attention site makes one row depend on another."""


class UnsupportedPrimitiveError(PartitionError):
    """A primitive for which the analysis has no rule meets a token axis."""


class UnsupportedSiteError(PartitionError):
    """An attention operator whose mask, scores or normalisation is not understood exactly."""
