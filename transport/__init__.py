"""Frames, messages and connections that carry attention between machines (empty until tier 2 leaves the process).

It will hold bounded length-prefixed frames, msgpack messages as frozen dataclasses, the handshake, a connection that
turns bytes into events without doing I/O, and the worker's server. It knows nothing of models or jaxprs and imports
no other package of the project.
"""
