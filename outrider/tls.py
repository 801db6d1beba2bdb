"""Connections: TLS always, one set of channel options for both sides, and who is calling on every call.

Both sides' keep-alive settings stand beside each other here, because a server that allows fewer pings than
its clients send cuts them off with ``too_many_pings``.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from outrider.errors import InvalidInput

DEFAULT_PORT = 8443

AUTHORIZATION_KEY = "authorization"
NODE_KEY = "x-outrider-node"
SESSION_KEY = "x-outrider-session"
EPOCH_KEY = "x-outrider-epoch"

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_METADATA_BYTES = 256 * 1024
"""Errors travel as metadata: a pipeline with a hundred mistakes has more than gRPC's default 8 KiB of them."""

CLIENT_PING_EVERY_MS = 20_000
SERVER_ALLOWS_PING_EVERY_MS = 5_000

Options = tuple[tuple[str, int | str], ...]

_COMMON: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES * 2),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

CLIENT_OPTIONS: Options = (
    *_COMMON,
    # Half of what home routers commonly keep an idle mapping for; a dead link is noticed within 30 s.
    ("grpc.keepalive_time_ms", CLIENT_PING_EVERY_MS),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # also how long one try of a connection may take
    ("grpc.max_reconnect_backoff_ms", 30_000),
    # Retries are outrider.retry's; two layers of them would multiply.
    ("grpc.enable_retries", 0),
    # Otherwise channels with equal settings share one connection, and bulk data would stand before commands.
    ("grpc.use_local_subchannel_pool", 1),
)

SERVER_OPTIONS: Options = (
    *_COMMON,
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.min_ping_interval_without_data_ms", SERVER_ALLOWS_PING_EVERY_MS),
    ("grpc.http2.max_ping_strikes", 0),
    # Two servers would otherwise share the port, and each get half of the connections.
    ("grpc.so_reuseport", 0),
)


@dataclass
class Identity:
    """Who is calling, put on every call of a channel. Change its fields and later calls carry the new ones.

    ``session_id`` and ``epoch`` are an agent's, set after Register.
    """

    token: str
    node_id: str = ""
    session_id: str = ""
    epoch: int = 0

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of a call made now."""
        pairs = [(AUTHORIZATION_KEY, f"Bearer {self.token}")]
        if self.node_id:
            pairs.append((NODE_KEY, self.node_id))
        if self.session_id:
            pairs += [(SESSION_KEY, self.session_id), (EPOCH_KEY, str(self.epoch))]
        return tuple(pairs)

    def __repr__(self) -> str:
        return f"Identity(node_id={self.node_id!r}, session_id={self.session_id!r}, epoch={self.epoch})"


class _IdentifiedCalls:
    """A method of a channel, each call of which carries the identity of that moment."""

    def __init__(self, method: Callable[..., Any], identity: Identity) -> None:
        self._method = method
        self._identity = identity

    def __call__(self, *args: Any, metadata: Sequence[tuple[str, str]] | None = None, **options: Any) -> Any:
        return self._method(*args, metadata=(*self._identity.metadata(), *(metadata or ())), **options)


class _IdentifiedChannel(grpc.aio.Channel):
    """A channel that adds an identity to all of its calls.

    Not with call credentials: gRPC asks for those from threads of its own, which wait for the interpreter's lock while
    they hold one that the interpreter's thread may be waiting for, in the middle of a cancellation or of a server's
    stop. Seen: a process that stood still for ever. Nor with interceptors, whose calls behave differently.
    """

    def __init__(self, channel: grpc.aio.Channel, identity: Identity) -> None:
        self._channel = channel
        self._identity = identity

    async def __aenter__(self) -> _IdentifiedChannel:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._channel.__aexit__(*error)

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    # Any: what gRPC's generated stubs hand over and take back differs from version to version, and is theirs alone.
    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return _IdentifiedCalls(self._channel.unary_unary(*args, **options), self._identity)

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return _IdentifiedCalls(self._channel.unary_stream(*args, **options), self._identity)

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return _IdentifiedCalls(self._channel.stream_unary(*args, **options), self._identity)

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return _IdentifiedCalls(self._channel.stream_stream(*args, **options), self._identity)


def open_channel(
    server: str,
    *,
    ca: bytes | None = None,
    identity: Identity | None = None,
    server_name: str | None = None,
    options: Options = (),
) -> grpc.aio.Channel:
    """A TLS channel to ``server`` ("host:port"); nothing is sent before the first call.

    ``ca``: PEM of the CAs to trust, None for those of the system. ``identity`` goes with every call.
    ``server_name``: the name that the certificate must have, where it is not the host of ``server``.
    Raises InvalidInput if ``server`` or a token is malformed.
    """
    host, port = parse_server(server)
    credentials = grpc.ssl_channel_credentials(root_certificates=ca)
    if identity is not None:
        check_token(identity.token)
    extra: Options = (("grpc.ssl_target_name_override", server_name),) if server_name else ()
    every = [*CLIENT_OPTIONS, *extra, *options]
    channel = grpc.aio.secure_channel(join_address(host, port), credentials, options=every)
    return channel if identity is None else _IdentifiedChannel(channel, identity)


def read_ca(path: Path) -> bytes:
    """The PEM in ``path``. Raises InvalidInput if it is missing or holds no certificate."""
    try:
        pem = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidInput(f"the CA file {path} can't be read: {reason}", code="ca_unreadable") from error
    try:
        # An empty text would be taken for "the system's own".
        ssl.create_default_context(cadata=pem.decode("ascii") or "empty")
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
        raise InvalidInput(f"the CA file {path} holds no PEM certificate", code="ca_invalid") from error
    return pem


def parse_server(text: str) -> tuple[str, int]:
    """Host and port of "host:port", "host" (port 8443) or "[v6]:port". Raises InvalidInput if it is none of these."""
    problem = InvalidInput(f"{text!r} is not the address of a server", code="bad_address", hint="write host:port")
    rest = text.removeprefix("https://").rstrip("/")
    if rest.startswith("["):
        host, closed, port_text = rest[1:].partition("]")
        if not closed or (port_text and not port_text.startswith(":")):
            raise problem
        port_text = port_text[1:]
    elif rest.count(":") > 1:
        host, port_text = rest, ""
    else:
        host, _, port_text = rest.partition(":")
    if not host or any(character.isspace() or character in "/@?#" for character in host):
        raise problem
    if not port_text:
        return host, DEFAULT_PORT
    if not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text) < 65536):
        raise problem
    return host, int(port_text)


def join_address(host: str, port: int) -> str:
    """ "host:port", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_token(token: str) -> None:
    """Refuse a token that can't be sent (empty, or with characters that HTTP/2 metadata has no room for)."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidInput(
            "the token is empty or has characters that no token has", code="bad_token", hint="copy it as it was shown"
        )
