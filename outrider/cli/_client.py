"""The connection to the server: TLS, token, deadlines, retries, and one clear sentence when it can't be made."""

from __future__ import annotations

import queue
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from outrider.cli._context import Target
from outrider.errors import (
    OperationTimeout,
    OutriderError,
    PermanentError,
    Unauthenticated,
    Unavailable,
)
from outrider.retry import RetryPolicy
from outrider.tls import CLIENT_OPTIONS, read_ca
from outrider.v1.control_service_pb2_grpc import ControlServiceStub
from outrider.wire import STATUS_DETAILS_KEY, from_rpc_error

R = TypeVar("R")

CALL_TIMEOUT_S = 20.0
PATIENCE_S = 0.8
"""How long a connection may take before the reason is looked for."""
SILENCE_S = 2.0
"""How long where nothing is heard at all: from an address that is none, or over a slow link, or a busy machine."""
CONNECT_TIMEOUT_S = 10.0
"""How long it may take where a probe finds nothing wrong: a slow link, a busy machine."""


def request_id() -> str:
    """A fresh id for a changing call: sent again with a retry, it makes the call safe to repeat."""
    return uuid.uuid4().hex


class Client:
    """A connection to the ControlService; a context manager.

    ``stub`` has the methods. Hand one to ``call`` or ``stream`` with its request: what goes wrong is raised as an
    OutriderError. Connects when it is made and raises Unavailable, with the cause, if it can't.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._metadata = (("authorization", f"Bearer {target.token}"),)
        roots = read_ca(target.ca) if target.ca else None
        credentials = grpc.ssl_channel_credentials(root_certificates=roots)
        self._channel = grpc.secure_channel(target.server, credentials, options=CLIENT_OPTIONS)
        self.stub = ControlServiceStub(self._channel)
        try:
            self._wait_until_ready()
        except BaseException:
            self._channel.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._channel.close()

    def call(self, method: Callable[..., R], request: Any, *, timeout_s: float = CALL_TIMEOUT_S) -> R:
        """One unary call. A connection lost on the way is tried again: every changing request carries its id."""
        waits = RetryPolicy().waits()
        while True:
            try:
                return method(request, timeout=timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                wait = next(waits, None) if _connection_lost(error) else None
                if wait is None:
                    raise self.translate(error, timeout_s) from error
                time.sleep(wait)

    def stream(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        """A server stream, or one in both directions if ``request`` is an iterator; ends with the generator."""
        call = method(request, metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self.translate(error, 0) from error
        finally:
            call.cancel()

    def translate(self, error: grpc.RpcError, timeout_s: float) -> OutriderError:
        """The error of a call, with what only this side knows: where the server is and where its token is from."""
        code = error.code() if isinstance(error, grpc.Call) else None
        server = self.target.server
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated(
                f"the server at {server} does not accept the token", hint=f"it is from {self.target.token_source}"
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return PermanentError(
                f"the server at {server} does not know this call", hint="it is not an Outrider server, or an older one"
            )
        if _connection_lost(error):
            lost = Unavailable(f"the connection to the server at {server} was lost")
            return diagnose(self.target, PATIENCE_S) or lost
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and not _has_detail(error):
            return OperationTimeout(f"the server at {server} gave no answer within {timeout_s:g} s")
        return from_rpc_error(error, target=f"the server at {server}")

    def _wait_until_ready(self) -> None:
        states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
        self._channel.subscribe(states.put, try_to_connect=True)
        try:
            started, patience = time.monotonic(), PATIENCE_S
            while True:
                try:
                    state = states.get(timeout=max(0.0, started + patience - time.monotonic()))
                except queue.Empty:
                    found = diagnose(self.target, 0.2) if patience < CONNECT_TIMEOUT_S else None
                    if found and found.code == SILENT and patience == PATIENCE_S:
                        patience = SILENCE_S
                        continue
                    if found or patience == CONNECT_TIMEOUT_S:
                        sentence = f"the server at {self.target.server} did not answer within {patience:g} s"
                        raise found or Unavailable(sentence, hint=self.target.source) from None
                    patience = CONNECT_TIMEOUT_S
                    continue
                if state is grpc.ChannelConnectivity.READY:
                    return
                if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                    raise diagnose(self.target, PATIENCE_S) or Unavailable(
                        f"the server at {self.target.server} closed the connection", hint="it may be starting"
                    )
        finally:
            self._channel.unsubscribe(states.put)


def _has_detail(error: grpc.RpcError) -> bool:
    trailing: Any = error.trailing_metadata() if isinstance(error, grpc.Call) else None
    return any(key == STATUS_DETAILS_KEY for key, _ in trailing or ())


def _connection_lost(error: grpc.RpcError) -> bool:
    """Whether the transport says so, and not the server: what the server refuses carries its reason."""
    return isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAVAILABLE and not _has_detail(error)


# OpenSSL's X509_V_ERR_* (x509_vfy.h): the certificate is good, but for another name or time.
_NAME_MISMATCH = {62, 64}
_NOT_NOW = {9, 10}
SILENT = "silent"
"""The code of an error that says no more than that nothing was heard in the time."""


def diagnose(target: Target, timeout_s: float) -> OutriderError | None:
    """Why no connection can be made, in one sentence; None if nothing is found to be wrong.

    gRPC says "UNAVAILABLE" to all of it, so the steps are taken one by one: name, TCP, TLS, and the protocol
    agreed on (ALPN, RFC 7301).
    """
    server, source = target.server, target.source
    try:
        plain = socket.create_connection((target.host, target.port), timeout=timeout_s)
    except socket.gaierror:
        return Unavailable(f"the name of the server {target.host!r} can't be resolved", hint=f"it is from {source}")
    except TimeoutError:
        return Unavailable(
            f"there is no answer from {server}",
            code=SILENT,
            hint=f"a firewall, or a wrong address? It is from {source}",
        )
    except ConnectionRefusedError:
        return Unavailable(
            f"nothing listens at {server}: the server is not running, or this is not its port",
            hint=f"the address is from {source}",
        )
    except OSError as error:
        return Unavailable(f"{server} can't be reached: {error.strerror}", hint=f"the address is from {source}")
    with plain:
        context = ssl.create_default_context(cafile=str(target.ca) if target.ca else None)
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # as gRPC verifies
        context.set_alpn_protocols(["h2"])
        try:
            with context.wrap_socket(plain, server_hostname=target.host) as secure:
                if secure.selected_alpn_protocol() == "h2":
                    return None
                return PermanentError(f"what listens at {server} speaks TLS, but not gRPC: this is not Outrider's port")
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in _NAME_MISMATCH:
                return PermanentError(
                    f"the certificate of the server at {server} is not for {target.host!r}",
                    hint="use a name that stands in the certificate",
                )
            if error.verify_code in _NOT_NOW:
                return PermanentError(f"the certificate of the server at {server} is not valid now")
            signer = f"was not issued by the CA in {target.ca}" if target.ca else "is of no well-known CA"
            return PermanentError(
                f"the certificate of the server at {server} {signer}", hint="the wrong CA, or another server"
            )
        except TimeoutError:
            return Unavailable(
                f"what listens at {server} says nothing",
                code=SILENT,
                hint=f"it is busy, or this is not Outrider's port; the address is from {source}",
            )
        except (ssl.SSLError, OSError):
            return PermanentError(
                f"what listens at {server} does not speak TLS: this is not Outrider's port",
                hint=f"the address is from {source}",
            )
