"""Partitioner: finds the attention of a plain causal model in its jaxpr, proves the rest token-wise, and cuts there."""

from partition.attention_spec import AttentionSpec, reference_attention
from partition.compile import StageFunction, prepare_site_weights, prepare_weights, stage_functions
from partition.cut import Send, Stage
from partition.errors import (
    PartitionError,
    TokenMixingError,
    TraceError,
    UnsupportedPrimitiveError,
    UnsupportedSiteError,
)
from partition.jaxpr import Value
from partition.layouts import Port
from partition.plan import Plan, partition
from partition.planned_site import PlannedSite

__all__ = [
    "AttentionSpec",
    "PartitionError",
    "Plan",
    "PlannedSite",
    "Port",
    "Send",
    "Stage",
    "StageFunction",
    "TokenMixingError",
    "TraceError",
    "UnsupportedPrimitiveError",
    "UnsupportedSiteError",
    "Value",
    "partition",
    "prepare_site_weights",
    "prepare_weights",
    "reference_attention",
    "stage_functions",
]
