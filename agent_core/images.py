"""Images as the node's policy wants them: pulled or not, from where, and with which content.

What a step costs depends on this being asked seldom: where the policy leaves the content to the name, and pulls only
what is missing, a container is created by the image's name, and the engine is asked for the image only when it says
that there is none.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator

from agent_core.image_policy import ImagePolicy
from agent_core.references import ImageReference
from agent_core.runtimes.base import ImageInfo, Runtime
from outrider.errors import NotFound, OutriderError, PermanentError
from outrider.retry import OperationCounts, RetryPolicy

_REMEMBERED = 4096  # (run, image) that were asked for with `pull: always`
_EVERY_S = 0.5  # between two words about how far a pull is

Tell = Callable[[int, int, str], None]
"""Hears bytes done, bytes of what is known by now, and a sentence."""


class Images:
    """The images of one engine under one policy. Every error is an OutriderError that names the image."""

    def __init__(self, runtime: Runtime, policy: ImagePolicy, operations: OperationCounts | None = None) -> None:
        self._runtime = runtime
        self._policy = policy
        self._operations = operations or OperationCounts()
        self._asked: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def before_create(self, image: str, *, run: str = "", tell: Tell | None = None) -> str:
        """What has to be done before a container is created from ``image``, which mostly is nothing.

        Gives the id to create it from, "" for its name. Where the engine then says that it has no such image,
        call `ensure`.
        """
        if self._policy.pull == "always" or self._policy.digest_of(self._policy.check(image)):
            return await self.ensure(image, run=run, tell=tell)
        return ""

    async def ensure(self, image: str, *, run: str = "", tell: Tell | None = None) -> str:
        """Have ``image`` on the node, pulled if the policy lets it be; what the container is to be created from.

        That is the image's id where the policy or the reference says which content it is, and "" where its name
        says it. ``run``: with ``pull: always`` a registry is asked once for each. Raises NotFound (no such image),
        TemporaryError (``registry_unavailable``), PolicyViolation, or PermanentError (it has another content).
        """
        reference = self._policy.check(image)
        source = self._policy.source_of(reference)
        digest = self._policy.digest_of(reference)
        # What is known by its content has no newer version.
        if digest or self._policy.pull != "always" or (run, image) in self._asked:
            info = await self._present(reference, source, digest)
            if info is not None:
                return info.id if digest else ""
        if self._policy.pull == "never":
            raise await self._missing(reference, digest)
        info = await self._pull(reference, source, digest, tell)
        if run and not digest:
            self._asked[run, image] = None
            while len(self._asked) > _REMEMBERED:
                self._asked.popitem(last=False)
        return info.id if digest else ""

    async def _present(self, reference: ImageReference, source: ImageReference, digest: str) -> ImageInfo | None:
        """The image as it is on the node, if it is there with the right content."""
        for name in _names(reference, source, digest):
            try:
                info = await self._runtime.find_image(name)
            except NotFound:
                continue
            if not digest:
                return info
            # By its id alone any image of the node would do, whatever names the policy allows.
            names = {ImageReference.parse(each).repository for each in (*info.tags, *info.digests) if "<" not in each}
            if info.has_content(digest) and names & {reference.repository, source.repository}:
                return info
        return None

    async def _missing(self, reference: ImageReference, digest: str) -> OutriderError:
        if digest and await self._present(reference, reference, "") is not None:
            return PermanentError(
                f"the image {reference} on this node has another content than {digest}",
                code="image_digest_mismatch",
                hint="load the right one there (outrider images load), or change images.digests of its policy",
            )
        return NotFound(
            f"the image {reference} is not on this node, and its policy pulls none",
            code="image_not_found",
            hint="load it there: outrider images load FILE, with a file made by outrider images save",
        )

    async def _pull(
        self, reference: ImageReference, source: ImageReference, digest: str, tell: Tell | None
    ) -> ImageInfo:
        wanted = str(source.at(digest) if digest else source)
        meter = None if tell is None else _Meter(str(reference), tell)
        try:
            # A question that timed out is asked again by who called this, after saying so.
            info = await self._operations.run(
                "image.pull",
                RetryPolicy(),
                lambda: self._runtime.pull_image(wanted, on_progress=meter),
                idempotent=False,
            )
        except NotFound as error:
            if source == reference:
                raise
            message = f"{error.message} (this node's policy has {reference} from there)"
            raise NotFound(message, code=error.code, hint=error.hint) from error
        finally:
            if meter is not None:
                meter.over()
        if digest and not info.has_content(digest):
            raise PermanentError(
                f"{wanted} was pulled, and the engine does not say that it is that content",
                code="image_digest_mismatch",
                hint="pull it by its name on the node, and compare the digests",
            )
        if not digest and source != reference:
            await self._runtime.tag_image(info.id, reference.name, reference.effective_tag)
        return info


def _names(reference: ImageReference, source: ImageReference, digest: str) -> Iterator[str]:
    if not digest:
        yield str(reference)
        return
    if reference.tag:
        yield f"{reference.name}:{reference.tag}"
    yield str(reference.at(digest))
    if source.repository != reference.repository:
        yield str(source.at(digest))
    yield digest


class _Meter:
    """Says now and then how far a pull is, and how fast."""

    def __init__(self, image: str, tell: Tell) -> None:
        self._image = image
        self._tell = tell
        self._clock = asyncio.get_running_loop().time
        self._first: tuple[float, int] | None = None
        self._told = float("-inf")

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if self._first is None:
            self._first = (now, done)
        if now - self._told < _EVERY_S and done < total:
            return
        self._told = now
        since, before = self._first
        rate = f" at {(done - before) / (now - since) / 1e6:.1f} MB/s" if now - since >= _EVERY_S else ""
        self._tell(done, total, f"pulling {self._image}{rate}")

    def over(self) -> None:
        """Nothing is being pulled any more: what stands there is to go."""
        if self._first is not None:
            self._tell(0, 0, "")
