"""What the two services are made of."""

from __future__ import annotations

from dataclasses import dataclass

from server_core.access import Access
from server_core.admission import Admission
from server_core.bus.base import Bus
from server_core.config import ServerConfig
from server_core.dispatch import Dispatcher
from server_core.drains import Drains
from server_core.fleet import Fleet
from server_core.security.vault import Vault
from server_core.store.base import Database
from server_core.streams import Pipes


@dataclass(frozen=True, slots=True)
class Services:
    config: ServerConfig
    db: Database
    bus: Bus
    fleet: Fleet
    dispatcher: Dispatcher
    drains: Drains
    vault: Vault
    pipes: Pipes
    access: Access
    admission: Admission
    server_id: str
    started_us: int
