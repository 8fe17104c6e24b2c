from __future__ import annotations

import hashlib
import hmac
import random

import msgpack
import pytest

from transport.errors import AuthenticationError, HandshakeError, TransportError, VersionError
from transport.handshake import Handshake, Role
from transport.messages import Ping, Pong
from transport.protocol import Connection
from wire import feed, joined

SECRET = b"a secret of this job"


def converse(client: Connection, server: Connection) -> None:
    """Carry bytes to and fro until both are silent."""
    while (to_server := client.take_output()) or (to_client := server.take_output()):
        if to_server:
            feed(server, to_server, [1, 2, 30])
        else:
            feed(client, to_client, [39])


def established(secret: bytes | None) -> tuple[Connection, Connection]:
    client, server = Connection(Role.CLIENT, secret), Connection(Role.SERVER, secret)
    converse(client, server)
    return client, server


@pytest.mark.parametrize("secret", [None, SECRET])
def test_both_directions_work_after_the_handshake(secret):
    client, server = established(secret)
    assert client.established and server.established
    assert feed(server, joined(client.encode(Ping(token=5)))) == [Ping(token=5)]
    assert feed(client, joined(server.encode(Pong(token=5)))) == [Pong(token=5)]


def test_proofs_and_keys_are_as_documented():
    client, server = Handshake(Role.CLIENT, SECRET, b"c" * 32), Handshake(Role.SERVER, SECRET, b"s" * 32)
    challenges = b"".join(b"HJXC\x02\x01\x00\x00" + nonce * 32 for nonce in (b"c", b"s"))

    def derived(label: bytes) -> bytes:
        return hmac.new(SECRET, b"hetero_jax " + label + b"\0" + challenges, hashlib.sha256).digest()

    first = client.take_output()
    feed(server, first)
    second = server.take_output()
    assert first + second == challenges
    feed(client, second)
    third = client.take_output()
    assert third == derived(b"client proof")
    assert client.keys is None  # the server has not proven anything yet
    feed(server, third)
    fourth = server.take_output()
    assert fourth == derived(b"server proof")
    feed(client, fourth)
    assert client.keys == (derived(b"client key"), derived(b"server key"))
    assert server.keys == (derived(b"server key"), derived(b"client key"))


@pytest.mark.parametrize(
    ("ours", "theirs", "error"),
    [
        (SECRET, b"another secret here!", "does not know the secret"),
        (SECRET, None, "comes without a secret, this side with a secret"),
        (None, SECRET, "comes with a secret, this side without a secret"),
    ],
)
def test_peers_without_our_secret_are_refused(ours, theirs, error):
    server, client = Connection(Role.SERVER, ours), Connection(Role.CLIENT, theirs)
    with pytest.raises(AuthenticationError, match=error):
        converse(client, server)
    assert not server.established and not client.established


def test_an_unknown_peer_reaches_no_msgpack_and_gets_the_challenge_alone(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("msgpack was reached")

    monkeypatch.setattr(msgpack, "Unpacker", forbidden)
    monkeypatch.setattr(msgpack, "unpackb", forbidden)
    chance = random.Random(0)
    begin = Handshake(Role.CLIENT, SECRET).take_output()
    for trial in range(300):
        server = Connection(Role.SERVER, SECRET)
        data = (begin if trial % 2 else chance.randbytes(40)) + chance.randbytes(5000)
        with pytest.raises(HandshakeError):
            feed(server, data, [chance.randrange(1, 60)])
        assert not server.established
        assert len(server.take_output()) == (40 if trial % 2 else 0)


def test_proofs_cannot_be_reflected_or_replayed():
    # A server that has no secret sends back what it is sent.
    mirror = Handshake(Role.CLIENT, SECRET)
    feed(mirror, mirror.take_output())
    with pytest.raises(AuthenticationError):
        feed(mirror, mirror.take_output())
    # A client that has no secret repeats what another one sent.
    client, server = Handshake(Role.CLIENT, SECRET), Handshake(Role.SERVER, SECRET)
    challenge = client.take_output()
    feed(server, challenge)
    feed(client, server.take_output())
    proof = client.take_output()
    again = Handshake(Role.SERVER, SECRET)
    feed(again, challenge)
    with pytest.raises(AuthenticationError):
        feed(again, proof)


def test_frames_of_one_direction_are_refused_in_the_other():
    client, server = established(SECRET)
    with pytest.raises(TransportError, match="tag"):
        feed(client, joined(client.encode(Ping(token=1))))
    del server


def test_other_versions_are_named_on_both_sides():
    client, server = Handshake(Role.CLIENT, SECRET), Handshake(Role.SERVER, SECRET)
    begin = bytearray(client.take_output())
    begin[4] = 7
    with pytest.raises(VersionError, match="wire version 7, this side 2"):
        feed(server, bytes(begin))
    assert server.take_output()[4] == 2  # so that the other side can say it too


def test_what_is_no_peer_is_named():
    with pytest.raises(HandshakeError, match="begins with b'GET '; allowed: b'HJXC'"):
        feed(Handshake(Role.SERVER, None), b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n"[:40])


def test_a_short_secret_is_refused():
    with pytest.raises(AuthenticationError, match="5 bytes; allowed: at least 16"):
        Handshake(Role.SERVER, b"short")
