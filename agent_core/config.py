"""All configuration of the agent in one object, loaded before anything starts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from outrider._plugin_bounds import LIMIT_S
from outrider.errors import InvalidInput

ENV_PREFIX = "OUTRIDER_AGENT_"
_NODE_ID = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")


class PluginSettings(BaseModel):
    """Those settings of an agent that choose its step plugins, for whoever wants to know what it would load."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    plugins: list[str] | None = None
    disabled_plugins: list[str] = Field(default_factory=list)
    plugin_limit_s: Annotated[float, Field(gt=0)] = LIMIT_S


class AgentConfig(BaseModel):
    """The settings of one agent: from a YAML file, ``OUTRIDER_AGENT_*`` and flags, see outrider.settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    node_id: str
    server: str = "localhost:8443"  # host:port
    server_name: str | None = None  # the name in the server's certificate, where it is not the host of `server`
    token: SecretStr | None = None
    token_file: Path | None = None
    ca_file: Path | None = None  # None: the CAs of the system
    state_dir: Path = Path("/var/lib/outrider")
    runtime: str = "docker"  # an entry point of the group outrider.runtimes
    engine_socket: Path | None = None  # the engine's Unix socket; None: the driver's own default
    plugins: list[str] | None = None  # step plugins by name; None: all that are installed
    disabled_plugins: list[str] = Field(default_factory=list)
    plugin_limit_s: Annotated[float, Field(gt=0)] = LIMIT_S  # of the import of a plugin, and of each call of a hook
    policy_file: Path | None = None
    port_range: tuple[int, int] | None = None  # "20000-20999"; None: as the policy says
    labels: dict[str, str] = Field(default_factory=dict)
    step_timeout_s: Annotated[float, Field(gt=0)] = 6 * 3600  # of steps that name none
    spool_max_bytes: Annotated[int, Field(ge=1024**2)] = 1024**3
    cancel_grace_s: Annotated[float, Field(ge=0)] = 10.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @field_validator("node_id")
    @classmethod
    def _node_id(cls, value: str) -> str:
        if not _NODE_ID.fullmatch(value):
            raise ValueError(f"{value!r} is no node id: lower-case letters, digits, '.', '_' and '-', at most 63")
        return value

    @field_validator("port_range", mode="before")
    @classmethod
    def _port_range(cls, value: Any) -> Any:
        if isinstance(value, str):
            first, dash, last = value.partition("-")
            if not (dash and first.isdigit() and last.isdigit()):
                raise ValueError(f"{value!r} is no port range; it reads like 20000-20999")
            return int(first), int(last)
        return value

    @model_validator(mode="after")
    def _one_token(self) -> AgentConfig:
        if self.token is not None and self.token_file is not None:
            raise ValueError("give token or token_file, not both")
        return self

    def read_token(self) -> str:
        """The node's credential, read anew each time: its file may have been replaced. Raises InvalidInput."""
        if self.token is not None:
            return self.token.get_secret_value()
        path = self.token_file
        if path is None:
            # systemd's LoadCredential puts it here; the variable is the service manager's, not a setting.
            directory = os.environ.get("CREDENTIALS_DIRECTORY")
            path = Path(directory) / "token" if directory else self.state_dir / "token"
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(
                f"the node's token can't be read from {path}: {getattr(error, 'strerror', None) or error}",
                code="token_unreadable",
                hint="`outrider node add` prints it; put it into a file and give token_file",
            ) from error
