"""Which entries are meant: include, exclude and strip_components."""

from __future__ import annotations

from collections.abc import Sequence

from outrider_stepkit import Selection

from archiving.names import MAX_DEPTH, Names, Parts


class Patterns:
    """Whether a path is among what is included (all, if nothing is named) and not excluded."""

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self._both = Selection(include, exclude)
        self._kept = Selection(exclude=exclude)
        self.all = not include and not exclude

    def take(self, path: str) -> bool:
        return self._both.wants(path)

    def leaves_out(self, path: str) -> bool:
        """Whether the folder ``path`` is excluded with all that is in it."""
        return not self._kept.wants(path)


class Choice:
    """Where an entry of an archive goes, if anywhere. Every name is vetted first, whether it is chosen or not."""

    def __init__(
        self, *, strip: int = 0, include: Sequence[str] = (), exclude: Sequence[str] = (), max_depth: int = MAX_DEPTH
    ) -> None:
        self._strip = strip
        self._patterns = Patterns(include, exclude)
        self._names = Names(max_depth)

    def full(self, name: str, *, backslash: bool) -> Parts:
        """The path as it stands in the archive."""
        return self._names.parts(name, backslash=backslash)

    def parts(self, name: str, *, backslash: bool) -> Parts | None:
        """The path below the target; ``()`` for the target itself, None for what is left out."""
        parts = self.full(name, backslash=backslash)
        if not self._patterns.all and parts and not self._patterns.take("/".join(parts)):
            return None
        if self._strip == 0:
            return parts
        return parts[self._strip :] or None

    def stripped(self, name: str, *, backslash: bool) -> Parts:
        """Where the target of a hard link was unpacked to, if it was."""
        return self.full(name, backslash=backslash)[self._strip :]
