"""Asks a Teeworlds 0.7 server what it is, as a player's client does before it joins.

Standard library only. The exchange, from the game's network protocol (src/engine/shared/network.h and
src/mastersrv/mastersrv.h of Teeworlds 0.7): a token handshake guards against spoofed addresses, then one
connectionless request is answered by one packet.
"""

from __future__ import annotations

import secrets
import socket
import sys
import time
from dataclasses import dataclass

_CONTROL = 1 << 2
_CONNLESS = 8 << 2
_PACKET_VERSION = 1
_TOKEN_MESSAGE = 5
_TOKEN_NONE = b"\xff\xff\xff\xff"
_TOKEN_REQUEST_SIZE = 512  # a request as large as any answer, so that it can't be used to amplify
_GET_INFO = b"\xff\xff\xff\xffgie3"
_INFO = b"\xff\xff\xff\xffinf3"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server answered. ``ping_ms`` is the time of the last round trip."""

    version: str
    name: str
    map: str
    game_type: str
    players: int
    max_players: int
    ping_ms: float


def ask(host: str, port: int, *, timeout_s: float = 2.0, tries: int = 5) -> ServerInfo:
    """The server's answer; asked again when a packet is lost. Raises OSError when it does not answer at all."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(timeout_s)
        udp.connect((host, port))
        for left in reversed(range(tries)):
            try:
                return _exchange(udp)
            except OSError:
                if not left:
                    raise
                time.sleep(0.2)
    raise OSError(f"{host}:{port} was not asked")


def _exchange(udp: socket.socket) -> ServerInfo:
    mine = secrets.token_bytes(4)
    request = bytes([_TOKEN_MESSAGE]) + mine
    udp.send(bytes([_CONTROL, 0, 0]) + _TOKEN_NONE + request.ljust(_TOKEN_REQUEST_SIZE, b"\0"))
    answer = udp.recv(2048)
    if answer[3:7] != mine or answer[7:8] != bytes([_TOKEN_MESSAGE]):
        raise OSError("the server did not answer with a token")
    theirs = answer[8:12]
    started = time.monotonic()
    udp.send(bytes([_CONNLESS | _PACKET_VERSION]) + theirs + mine + _GET_INFO + b"\x01")
    answer = udp.recv(2048)
    ping_ms = (time.monotonic() - started) * 1000
    body = answer[9:]
    if not body.startswith(_INFO):
        raise OSError("the server did not answer with its information")
    _, rest = _unpack_int(body[len(_INFO) :])
    version, name, _hostname, map_name, game_type, rest = rest.split(b"\0", 5)
    _flags, rest = _unpack_int(rest)
    _skill, rest = _unpack_int(rest)
    players, rest = _unpack_int(rest)
    max_players, _ = _unpack_int(rest)
    texts = (part.decode("utf-8", "replace") for part in (version, name, map_name, game_type))
    return ServerInfo(*texts, players=players, max_players=max_players, ping_ms=ping_ms)


def _unpack_int(data: bytes) -> tuple[int, bytes]:
    """The game's variable-length integer: ESDDDDDD EDDDDDDD … (extend, sign, data), low bits first."""
    sign = data[0] >> 6 & 1
    value = data[0] & 0x3F
    shift, used = 6, 1
    while data[used - 1] & 0x80 and used < 5:
        value |= (data[used] & 0x7F) << shift
        shift += 7
        used += 1
    return (~value if sign else value), data[used:]


if __name__ == "__main__":
    print(ask(sys.argv[1], int(sys.argv[2])))
