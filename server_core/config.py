"""The server's configuration: one object, loaded before anything serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from outrider import tls

ENV_PREFIX = "OUTRIDER_SERVER_"


class ServerConfig(BaseModel):
    """Fields are read from a YAML file, the environment (OUTRIDER_SERVER_…) and flags; see outrider.settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_dir: Path = Path("/var/lib/outrider-server")
    """Store, keys and certificates; made with mode 0700."""
    listen: str = "0.0.0.0:8443"
    """Address and port; port 0 takes a free one."""
    names: tuple[str, ...] = ()
    """Further names and IP addresses by which agents and operators reach the server; they go into its certificate."""
    tls_cert_file: Path | None = None
    """PEM certificate chain to serve with, instead of one from the server's own CA."""
    tls_key_file: Path | None = None
    master_key_file: Path | None = None
    """32 bytes, mode 0600, that wrap the data key of env sets; default: master.key in data_dir, made on first start."""
    heartbeat_interval_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    missed_heartbeats: Annotated[int, Field(ge=1, le=100)] = 2
    """A node that has missed so many is offline."""
    registrations_per_second: Annotated[float, Field(gt=0, le=10_000)] = 100.0
    """How fast nodes that were all cut off are let back in; each of the others is told when its turn is."""
    command_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 20.0
    """How long an agent has to answer an operator's command, beyond the grace that the command itself gives."""
    keep_events_days: Annotated[float, Field(ge=0)] = 90.0
    """Older events are removed; 0 keeps them for ever."""
    keep_events: Annotated[int, Field(ge=0)] = 1_000_000
    """Of more than so many events the oldest are removed; 0 keeps all."""
    keep_logs_days: Annotated[float, Field(ge=0)] = 30.0
    """Logs of runs that have been over for longer are removed; 0 keeps them for ever."""
    keep_store_bytes: Annotated[int, Field(ge=0)] = 20 * 1024**3
    """Of a store that holds more than this the oldest logs are removed; 0 sets no limit."""
    disk_reserve_bytes: Annotated[int, Field(ge=0)] = 128 * 1024**2
    """With less free disk, new runs, objects, logs and events are refused; what running runs report is still taken."""
    housekeeping_interval_s: Annotated[float, Field(gt=0)] = 3600.0
    """How often what is too old is removed, and the certificate looked at."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("listen")
    @classmethod
    def _address(cls, listen: str) -> str:
        if listen.endswith(":0"):
            return listen
        host, port = tls.parse_server(listen)
        return tls.join_address(host, port)

    @model_validator(mode="after")
    def _pair(self) -> ServerConfig:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file go together: give both or neither")
        return self

    @property
    def store_file(self) -> Path:
        return self.data_dir / "store.db"

    @property
    def key_file(self) -> Path:
        return self.master_key_file or self.data_dir / "master.key"

    @property
    def ca_file(self) -> Path:
        """The CA that agents and operators must trust; of no use where tls_cert_file is given."""
        return self.data_dir / "tls" / "ca.pem"
