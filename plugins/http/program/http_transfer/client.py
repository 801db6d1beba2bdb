"""Requests to one address: its credentials, its redirects, and what its answers mean."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from outrider_stepkit import StepFailure
from outrider_stepkit.network import AddressGuard

from http_transfer.address import Url
from http_transfer.connection import Answer, Settings, Wire, proxy_credentials
from http_transfer.failures import HttpFailure, of_status

MAX_REDIRECTS = 10
_MAX_CA_BYTES = 4 * 1024**2
_SCRAP_BYTES = 64 * 1024
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BASE_HEADERS = {"User-Agent": "outrider-step-http", "Accept": "*/*", "Accept-Encoding": "identity"}


class Body(Protocol):
    """What is sent: pieces, from the start each time that it is iterated over."""

    def __iter__(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Route:
    """Where redirects have led, and what may be told there."""

    url: Url
    given: Mapping[str, str]
    """The given headers and the credentials; none once another origin was on the way."""


class Client:
    """Sends requests to the address of ``params`` with the credentials of ``env``."""

    def __init__(self, params: Mapping[str, Any], env: Mapping[str, str]) -> None:
        """Raises StepFailure for what can't be right."""
        try:
            url = Url.parse(params["url"])
        except ValueError as error:
            raise StepFailure(f"url: {error}", code="invalid_request") from None
        self.shown = url.shown
        self.start = Route(url, {**params.get("headers", {}), **_credentials(params, env)})
        self._settings = _settings(params, env)
        self.wire = Wire(self._settings)
        self.route = self.start
        """Where the last request ended up."""

    def another_wire(self) -> Wire:
        """For another thread."""
        return Wire(self._settings)

    def send(self, method: str, headers: Mapping[str, str] | None = None, body: Body | None = None) -> Answer:
        """The first answer that is no redirect, its body not read yet. Close it.

        ``headers`` go to every origin; the given ones and the credentials to the first origin only. ``body``
        is sent again from its start where a redirect says so. Raises HttpFailure for statuses from 400 on.
        """
        route = self.start
        for _ in range(MAX_REDIRECTS + 1):
            answer = self.send_to(self.wire, route, method, headers, body)
            location = answer.headers.get("Location") if answer.status in _REDIRECTS else None
            if location is None or (answer.status == 303 and method == "POST"):
                # 303 to a POST: it was carried out, and its result can be seen elsewhere (RFC 9110, 15.4.4).
                self.route = route
                return answer
            target = route.url.led_to(location)
            if body is not None and answer.status not in {307, 308}:
                raise HttpFailure(
                    f"{route.url.shown} answers a {method} with a redirect of status {answer.status} to "
                    f"{target.shown}, which would drop the body: give that address",
                    code="redirect",
                )
            answer.discard(_SCRAP_BYTES)
            route = Route(target, route.given if target.origin == route.url.origin else {})
        raise HttpFailure(f"{self.shown} leads to more than {MAX_REDIRECTS} redirects", code="redirect")

    @staticmethod
    def send_to(
        wire: Wire, route: Route, method: str, headers: Mapping[str, str] | None = None, body: Body | None = None
    ) -> Answer:
        """One request, and its answer. Raises HttpFailure for statuses from 400 on, and for one without meaning."""
        pieces: Iterable[bytes | memoryview] | None = None if body is None else iter(body)
        answer = wire.request(method, route.url, {**_BASE_HEADERS, **route.given, **(headers or {})}, pieces)
        failure = of_status(answer.status, answer.headers, route.url.shown)
        if failure is None and answer.status in {300, 305, 306}:
            failure = HttpFailure(f"{route.url.shown} answered with status {answer.status}", code="refused")
        if failure is not None:
            answer.discard(_SCRAP_BYTES)
            raise failure
        return answer


def _settings(params: Mapping[str, Any], env: Mapping[str, str]) -> Settings:
    proxy = None
    if params.get("proxy"):
        try:
            proxy = Url.parse(params["proxy"])
        except ValueError as error:
            raise StepFailure(f"proxy: {error}", code="invalid_request") from None
    user, password = env.get("HTTP_PROXY_USER"), env.get("HTTP_PROXY_PASSWORD")
    return Settings(
        guard=AddressGuard.from_environ(env),
        connect_s=float(params.get("connect_timeout_s", 10)),
        idle_s=float(params.get("idle_timeout_s", 60)),
        ca_pem=_own_authority(params, env),
        proxy=proxy,
        proxy_headers=proxy_credentials(user, password),
    )


def _own_authority(params: Mapping[str, Any], env: Mapping[str, str]) -> str | None:
    if not params.get("ca"):
        return env.get("HTTP_CA") or None
    with Path(params["ca"]).open("rb") as file:
        return file.read(_MAX_CA_BYTES).decode("utf-8", "replace")


def _credentials(params: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, str]:
    token, user, password, value = (
        env.get(f"HTTP_{name}") or "" for name in ("TOKEN", "USER", "PASSWORD", "AUTH_VALUE")
    )
    header = params.get("auth_header")
    if bool(header) != bool(value):
        missing = "the env HTTP_AUTH_VALUE" if header else "the parameter auth_header"
        raise StepFailure(
            f"auth_header names a header and HTTP_AUTH_VALUE is its value: {missing} is missing", code="bad_credentials"
        )
    if bool(user) != bool(password):
        given, missing = ("HTTP_USER", "HTTP_PASSWORD") if user else ("HTTP_PASSWORD", "HTTP_USER")
        raise StepFailure(f"{given} is given without {missing}: allot both, or neither", code="bad_credentials")
    kinds = [name for name, here in (("HTTP_TOKEN", token), ("HTTP_USER", user), ("HTTP_AUTH_VALUE", value)) if here]
    if len(kinds) > 1:
        raise StepFailure(f"{' and '.join(kinds)} are both given: allot one of them", code="bad_credentials")
    if token:
        if not token.isascii() or not token.isprintable() or " " in token:
            raise StepFailure("the value of HTTP_TOKEN has characters that a token can't have", code="bad_credentials")
        return {"Authorization": f"Bearer {token}"}
    if value:
        if not value.isascii() or not value.isprintable():
            raise StepFailure("the value of HTTP_AUTH_VALUE has characters that no header has", code="bad_credentials")
        return {str(header): value}
    if user:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {}
