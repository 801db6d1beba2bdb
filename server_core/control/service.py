"""ControlService, whole."""

from __future__ import annotations

from server_core.control.containers import Containers
from server_core.control.data import Data
from server_core.control.events import Events
from server_core.control.logs import Logs
from server_core.control.nodes import Nodes
from server_core.control.runs import Runs


class ControlService(Nodes, Runs, Logs, Containers, Data, Events):
    """What operators, the command line and the platform call."""
