from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_core.quota import VolumeWatch

if TYPE_CHECKING:
    from conftest import Parts


async def test_volume_that_grows_over_its_size_is_told_once_and_when_it_fits_again(parts: Parts) -> None:
    events: list[tuple[str, str, Mapping[str, Any] | None]] = []

    async def emit(type_: str, subject: str, data: Mapping[str, Any] | None) -> None:
        events.append((type_, subject, data))

    volume = await parts.volumes.allot("r1", "game/a", "build", "run", False, 64 * 1024)
    watch = VolumeWatch(parts.volumes, emit)
    await watch.once()
    assert events == []
    file = Path(volume.host_path, "data")
    file.write_bytes(b"x" * 256 * 1024)
    await watch.once()
    await watch.once()
    assert [(type_, subject) for type_, subject, _ in events] == [("volume.over_size", "build")]
    assert events[0][2] is not None
    assert events[0][2]["quota"] == "watch"
    assert events[0][2]["size_bytes"] == 64 * 1024
    file.unlink()
    await watch.once()
    assert events[-1][:2] == ("volume.within_size", "build")
