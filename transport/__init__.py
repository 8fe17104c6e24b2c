"""Attention between machines: frames, messages, connections, the worker's server and the engine's client.

The core does no input or output: `frames`, `handshake`, `header`, `codec` and `protocol` turn bytes into messages and
back. `streams`, `peer`, `server` and `client` are thin shells of blocking sockets around it. A worker implements
`Handler` and serves it with `WorkerServer`; an engine calls `connect`. It knows nothing of models or jaxprs and imports
no other package of the project.
"""

from transport.answers import Answer
from transport.client import WorkerClient, connect
from transport.errors import TransportError
from transport.frames import FrameLimits
from transport.messages import (
    MAX_LAYOUTS,
    MAX_PAGES_BYTES,
    Attend,
    FetchPages,
    Hello,
    Layout,
    Pages,
    Query,
    Release,
    Result,
    Stats,
    StorePages,
)
from transport.peer import Timing
from transport.server import Handler, WorkerServer

__all__ = [
    "MAX_LAYOUTS",
    "MAX_PAGES_BYTES",
    "Answer",
    "Attend",
    "FetchPages",
    "FrameLimits",
    "Handler",
    "Hello",
    "Layout",
    "Pages",
    "Query",
    "Release",
    "Result",
    "Stats",
    "StorePages",
    "Timing",
    "TransportError",
    "WorkerClient",
    "WorkerServer",
    "connect",
]
