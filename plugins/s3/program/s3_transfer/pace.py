"""How a transfer is cut into pieces where its rate is limited.

All connections wait for the one limit after each piece. With large pieces and a low limit each of them would be silent
for minutes, and a store that waits for the rest of a request gives it up long before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LEAST_BYTES = 16 * 1024
"""What is smaller costs more for its way through the layers than it spares in silence."""
_SILENCE_S = 2


@dataclass(frozen=True, slots=True)
class Pace:
    """``limit`` is in bytes a second, over all ``connections``."""

    connections: int
    limit: int | None = None

    @classmethod
    def read(cls, params: Mapping[str, Any]) -> Pace:
        """As the step was told; with fewer connections where the limit is too low for all of them to keep moving."""
        connections, limit = int(params.get("connections", 8)), params.get("limit_bytes_per_s")
        if limit is None:
            return cls(connections)
        return cls(max(1, min(connections, _SILENCE_S * limit // _LEAST_BYTES)), limit)

    def piece_bytes(self, most: int) -> int:
        """How much is sent or read at once, ``most`` at most."""
        if self.limit is None:
            return most
        return min(most, max(_LEAST_BYTES, self.limit // (4 * self.connections)))
