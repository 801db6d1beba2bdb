"""The context file: which servers there are, and which one is meant.

::

    current: dev
    contexts:
      dev: {server: "127.0.0.1:8443", ca: /…/ca.pem, token: …, node: dev}

It holds tokens, so it is its owner's alone (0600). ``OUTRIDER_SERVER``, ``OUTRIDER_CA`` and ``OUTRIDER_TOKEN``
win over what a context says.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Target:
    """A server to speak to. ``source`` says where this is written, for error messages."""

    host: str
    port: int
    ca: Path | None  # None: the well-known authorities
    token: str
    source: str
    node: str | None = None  # the node that is meant when none is named
    token_source: str = ""

    @property
    def server(self) -> str:
        """``host:port``, as people and gRPC read it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def default_file(environ: Mapping[str, str]) -> Path:
    """``context.yaml`` in the user's configuration directory (XDG base directory specification)."""
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".config")
    return Path(base) / "outrider" / "context.yaml"


class ContextFile:
    """The contexts of a file; a file that does not exist has none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.current: str | None = None
        self.contexts: dict[str, dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        from outrider._yaml import read_document

        try:
            document = read_document(self.path, f"the context file {self.path}")
        except FileNotFoundError:
            return
        if document is None:
            return
        contexts = document.get("contexts") if isinstance(document, dict) else None
        if not isinstance(contexts, dict) or not all(isinstance(entry, dict) for entry in contexts.values()):
            raise InvalidInput(
                f"the context file {self.path} has no mapping `contexts`",
                hint="each context is a mapping with server, ca and token",
            )
        self.current = document.get("current")
        self.contexts = contexts

    def put(self, name: str, entry: Mapping[str, Any], *, make_current: bool) -> None:
        """Set a context and write the file, atomically and readable by its owner alone."""
        import yaml

        self.contexts[name] = dict(entry)
        if make_current or self.current is None:
            self.current = name
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".context-")
        except OSError as error:
            raise InvalidInput(f"the context file {self.path} can't be written: {error.strerror}") from error
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                yaml.safe_dump({"current": self.current, "contexts": self.contexts}, file, sort_keys=False)
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise


def locate(environ: Mapping[str, str], context: str | None) -> tuple[Path, str | None]:
    """The context file, and the name in it that is asked for, if any, of what ``--context`` says.

    It is a file if it reads like a path, else a name in the user's own file.
    """
    if context and ("/" in context or context.endswith((".yaml", ".yml"))):
        return Path(context).expanduser(), None
    return default_file(environ), context or None


def find_target(environ: Mapping[str, str], context: str | None) -> Target:
    """The server that is meant: what the environment says, and for the rest the context.

    Raises InvalidInput if nothing says where it is, or what does is malformed.
    """
    path, name = locate(environ, context)
    server, token = environ.get("OUTRIDER_SERVER"), environ.get("OUTRIDER_TOKEN")
    file = ContextFile(path)
    chosen = name or file.current
    if chosen is not None and chosen not in file.contexts:
        known = ", ".join(sorted(file.contexts)) or "none"
        raise InvalidInput(f"there is no context {chosen!r} in {path}", code="no_context", hint=f"there: {known}")
    if chosen is None and not server:
        raise InvalidInput(
            f"no server is known: there is no context in {path} and OUTRIDER_SERVER is not set",
            code="no_context",
            hint="`outrider dev` starts one and writes a context",
        )
    entry = dict(file.contexts[chosen]) if chosen else {}
    source = token_source = f"context {chosen!r} in {path}"
    if server:
        # With the context's own CA, no one but its server gets the token. Without, anyone's server would.
        if not token and not entry.get("ca"):
            raise InvalidInput("OUTRIDER_SERVER is set but OUTRIDER_TOKEN is not", hint="set the operator's token")
        entry["server"], source = server, "OUTRIDER_SERVER"
    if token:
        entry["token"], token_source = token, "OUTRIDER_TOKEN"
    for variable, field in (("OUTRIDER_CA", "ca"), ("OUTRIDER_NODE", "node")):
        if environ.get(variable):
            entry[field] = environ[variable]
    return _target(entry, source, token_source)


def _target(entry: Mapping[str, Any], source: str, token_source: str) -> Target:
    from outrider.tls import check_token, parse_server

    server, token = str(entry.get("server") or ""), str(entry.get("token") or "").strip()
    if not server:
        raise InvalidInput(f"{source} names no server")
    if not token:
        raise InvalidInput(f"{source} has no token")
    check_token(token)
    try:
        host, port = parse_server(server)
    except InvalidInput as error:
        raise InvalidInput(f"{error.message} ({source})", code=error.code, hint=error.hint) from None
    ca = entry.get("ca")
    path = Path(str(ca)).expanduser() if ca else None
    if path is not None and not path.is_file():
        raise InvalidInput(f"the CA file {path} of {source} does not exist", code="file_missing")
    return Target(host, port, path, token, source, entry.get("node"), token_source)
