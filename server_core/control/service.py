"""ControlService, whole."""

from __future__ import annotations

from server_core.control.audit import Audit
from server_core.control.containers import Containers
from server_core.control.data import Data
from server_core.control.events import Events
from server_core.control.logs import Logs
from server_core.control.node_roles import NodeRoles
from server_core.control.retries import Retries


class ControlService(NodeRoles, Retries, Logs, Containers, Data, Events, Audit):
    """What operators, the command line and the platform call."""
