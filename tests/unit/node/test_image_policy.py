"""Which images a node runs, where it has them from, and which content a name stands for."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import docker.auth
import docker.utils
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_core.image_policy import ImagePolicy
from agent_core.images import Images
from agent_core.policy import NodePolicy
from agent_core.references import ImageReference
from agent_core.runtimes.base import ImageInfo
from agent_core.runtimes.fake import FakeRuntime
from outrider.errors import InvalidInput, NotFound, OutriderError, PermanentError, PolicyViolation

ONE, OTHER = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"


def policy(**section: Any) -> ImagePolicy:
    return NodePolicy.model_validate({"images": section}).images


# -- references


@pytest.mark.parametrize(
    ("text", "host", "full_path", "tag", "digest"),
    [
        ("debian", "docker.io", "library/debian", "", ""),
        ("docker.io/debian:12", "docker.io", "library/debian", "12", ""),
        ("game/arena:3", "docker.io", "game/arena", "3", ""),
        ("reg.lan:5000/a/b/c:1.0-x", "reg.lan:5000", "a/b/c", "1.0-x", ""),
        ("reg.lan:5000/a", "reg.lan:5000", "a", "", ""),
        ("localhost/a", "localhost", "a", "", ""),
        ("[::1]:5000/a:1", "[::1]:5000", "a", "1", ""),
        (f"game/arena:3@{ONE}", "docker.io", "game/arena", "3", ONE),
    ],
)
def test_a_reference_is_read_as_engines_read_it(text: str, host: str, full_path: str, tag: str, digest: str) -> None:
    parsed = ImageReference.parse(text)
    assert (parsed.host, parsed.full_path, parsed.tag, parsed.digest) == (host, full_path, tag, digest)
    assert str(parsed) == text


NO_NAMES = (
    *("", ":1", "a:", "a@", "A/b", "a//b", "../a", "a/../b", "a b", "a:1:2", "http://x/a", "a@sha256:12", "a\n"),
    *("a:1\n", f"a:{'t' * 129}", "-a", "a-", "a/", "/a", "reg.lan:port/a", "x" * 600),
)


@pytest.mark.parametrize("text", NO_NAMES)
def test_what_is_no_name_of_an_image_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not the name of an image"):
        ImageReference.parse(text)


@pytest.mark.parametrize("text", [ONE, "1" * 64, "cafe", "sha256:12"])
def test_a_name_that_could_be_an_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="may be an image's id as well as its name"):
        ImageReference.parse(text)


_PART = st.from_regex(r"[a-z0-9]{1,6}([_-][a-z0-9]{1,6}){0,2}", fullmatch=True)
_NAMES = st.builds(
    lambda host, parts, tag: f"{host}{'/'.join(parts)}x{tag}",
    st.sampled_from(["", "reg.lan/", "reg.lan:5000/", "localhost/", "docker.io/"]),
    st.lists(_PART, min_size=1, max_size=4),
    st.sampled_from(["", ":1", ":v1.2-x_3", f"@{ONE}"]),
)


@given(_NAMES)
def test_names_are_split_where_the_engines_own_client_splits_them(text: str) -> None:
    parsed = ImageReference.parse(text)
    repository, tag = docker.utils.parse_repository_tag(text)
    assert (parsed.name, parsed.digest or parsed.tag or None) == (repository, tag)
    registry, path = docker.auth.resolve_repository_name(repository)
    assert (parsed.host, parsed.path) == (registry, path)
    assert ImageReference.parse(str(parsed)) == parsed


@given(_NAMES, st.sampled_from(["mirror.lan", "mirror.lan:5000/games", "mirror"]))
def test_a_prefix_moves_an_image_and_leaves_tag_and_digest(text: str, prefix: str) -> None:
    reference = ImageReference.parse(text)
    source = policy(prefix=prefix).source_of(reference)
    assert (source.tag, source.digest) == (reference.tag, reference.digest)
    assert source.name == (reference.name if reference.registry else f"{prefix}/{reference.path}")


# -- the policy


def test_older_files_say_pull_with_yes_and_no() -> None:
    assert (policy(pull=True).pull, policy(pull=False).pull) == ("missing", "never")


def test_images_come_from_the_prefix_or_their_registrys_mirror() -> None:
    images = policy(prefix="mirror.lan:5000/own", mirrors={"ghcr.io": "mirror.lan/ghcr", "docker.io": "mirror.lan/hub"})
    sources = {
        "debian:12": "mirror.lan:5000/own/debian:12",
        "docker.io/debian:12": "mirror.lan/hub/library/debian:12",
        "ghcr.io/acme/step:1": "mirror.lan/ghcr/acme/step:1",
        "quay.io/a/b": "quay.io/a/b",
    }
    assert {name: str(images.source_of(ImageReference.parse(name))) for name in sources} == sources


def test_registries_limit_where_an_image_is_really_pulled_from() -> None:
    images = policy(prefix="mirror.lan", registries=["mirror.lan"])
    images.check("game/arena:3")
    with pytest.raises(PolicyViolation, match=r"from docker.io \(docker.io/game/arena:3\)") as caught:
        images.check("docker.io/game/arena:3")
    assert caught.value.hint == "images.registries: mirror.lan"
    with pytest.raises(PolicyViolation, match=r"from docker.io \(game/arena:3\)"):
        policy(registries=["reg.lan"]).check("game/arena:3")
    with pytest.raises(PolicyViolation, match=r"from mirror.lan \(game/a, pulled as mirror.lan/game/a\)"):
        policy(prefix="mirror.lan", registries=["reg.lan"]).check("game/a")


def test_a_name_stands_for_the_content_that_the_policy_gives_it() -> None:
    images = policy(digests={"game/arena:3": ONE, "tool": OTHER}, require_digest=True)
    for text in ("game/arena:3", "docker.io/game/arena:3", f"game/arena:3@{ONE}"):
        assert images.digest_of(images.check(text)) == ONE
    assert images.digest_of(images.check("tool:latest")) == OTHER
    assert images.digest_of(images.check(f"other@{OTHER}")) == OTHER
    with pytest.raises(PolicyViolation, match=r"wants to know the content of every image.*of game/arena:4 it does not"):
        images.check("game/arena:4")
    with pytest.raises(PolicyViolation, match="is not the content that this node's policy gives game/arena:3"):
        images.check(f"game/arena:3@{OTHER}")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"pull": "sometimes"}, "images.pull: Input should be 'always', 'missing' or 'never'"),
        ({"prefix": "https://mirror.lan"}, "has a scheme; it reads like registry.lan:5000"),
        ({"prefix": "Mirror Lan"}, "can't stand before an image's name"),
        ({"mirrors": {"ghcr.io": "mirror.lan/x:1"}}, "can't stand before an image's name"),
        ({"digests": {"a:1": "sha256:12"}}, "'sha256:12' of a:1 is no digest"),
        ({"digests": {"A:1": ONE}}, "'A:1' is not the name of an image"),
        ({"digests": {f"a@{ONE}": ONE}}, "has a digest already"),
    ],
)
def test_a_wrong_section_is_told_with_what_would_be_right(tmp_path: Any, section: dict[str, Any], words: str) -> None:
    import yaml

    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump({"images": section}))
    with pytest.raises(InvalidInput) as caught:
        NodePolicy.load(file)
    assert words in str(caught.value)


# -- the images of an engine


class Engine(FakeRuntime):
    """An engine whose images have contents: what it has, and what registries have, by name."""

    def __init__(self, has: dict[str, ImageInfo], registries: dict[str, ImageInfo] | None = None) -> None:
        super().__init__()
        self.has, self.registries = has, registries or {}

    async def find_image(self, image: str) -> ImageInfo:
        self._call("find_image", image)
        for info in self.has.values():
            if image in (*info.tags, *info.digests, info.id):
                return info
        raise NotFound(f"the image {image} is not on this node", code="image_not_found")

    async def pull_image(self, image: str, *, on_progress: Any = None) -> ImageInfo:
        self._call("pull_image", image)
        if image not in self.registries:
            raise NotFound(f"the image {image} could not be pulled", code="image_not_found", hint="look for it")
        if on_progress is not None:
            on_progress(10, 100)
            on_progress(100, 100)
        self.has[image] = self.registries[image]
        return self.has[image]

    def asked(self) -> list[tuple[str, str]]:
        return [call for call in self.calls if call[0] != "find_image"]


def image(name: str, digest: str = "", id_: str = ONE) -> ImageInfo:
    return ImageInfo(id_, tags=(name,) if "@" not in name else (), digests=(digest,) if digest else ())


async def test_a_step_by_its_name_asks_for_nothing() -> None:
    engine = Engine({})
    assert await Images(engine, policy()).before_create("game/arena:3") == ""
    assert engine.calls == []


async def test_missing_pulls_what_is_not_there_and_nothing_else() -> None:
    engine = Engine({"a:1": image("a:1")}, {"b:1": image("b:1")})
    images = Images(engine, policy())
    assert [await images.ensure(name) for name in ("a:1", "b:1", "b:1")] == ["", "", ""]
    assert engine.asked() == [("pull_image", "b:1")]


async def test_never_pulls_nothing_and_says_how_to_bring_it_there() -> None:
    engine = Engine({}, {"a:1": image("a:1")})
    with pytest.raises(NotFound, match="its policy pulls none") as caught:
        await Images(engine, policy(pull="never")).ensure("a:1")
    assert "outrider images load" in caught.value.hint
    assert engine.asked() == []


async def test_always_asks_the_registry_once_for_each_run() -> None:
    engine = Engine({"a:1": image("a:1")}, {"a:1": image("a:1")})
    images = Images(engine, policy(pull="always"))
    for run in ("r1", "r1", "r2", "", ""):
        assert await images.before_create("a:1", run=run) == ""
    assert engine.asked() == [("pull_image", "a:1")] * 4


async def test_always_is_not_content_with_what_is_there_when_the_registry_fails() -> None:
    with pytest.raises(NotFound, match="could not be pulled"):
        await Images(Engine({"a:1": image("a:1")}), policy(pull="always")).ensure("a:1", run="r1")


async def test_what_a_mirror_gives_gets_its_own_name() -> None:
    engine = Engine({}, {"mirror.lan/game/a:1": image("mirror.lan/game/a:1", id_=OTHER)})
    assert await Images(engine, policy(prefix="mirror.lan")).ensure("game/a:1") == ""
    assert engine.asked() == [("pull_image", "mirror.lan/game/a:1"), ("tag_image", "game/a:1")]
    with pytest.raises(
        NotFound, match=r"mirror.lan/game/b:1 could not be pulled \(this node's policy has game/b:1 from"
    ):
        await Images(engine, policy(prefix="mirror.lan")).ensure("game/b:1")


async def test_a_pinned_name_with_another_content_is_pulled_by_its_digest() -> None:
    right = image(f"m.lan/a@{ONE}", f"m.lan/a@{ONE}", id_=f"sha256:{'9' * 64}")
    engine = Engine({"a:1": image("a:1", id_=OTHER)}, {f"m.lan/a@{ONE}": right})
    images = Images(engine, policy(prefix="m.lan", digests={"a:1": ONE}))
    assert await images.before_create("a:1") == right.id
    assert await images.before_create("a:1") == right.id
    assert engine.asked() == [("pull_image", f"m.lan/a@{ONE}")]


async def test_a_pinned_name_with_another_content_never_runs() -> None:
    engine = Engine({"a:1": image("a:1", id_=OTHER)})
    with pytest.raises(PermanentError, match="has another content than sha256:1111") as caught:
        await Images(engine, policy(pull="never", digests={"a:1": ONE})).before_create("a:1")
    assert caught.value.code == "image_digest_mismatch"


async def test_an_engine_that_pulled_another_content_is_not_believed() -> None:
    engine = Engine({}, {f"a@{ONE}": image("a:1", id_=OTHER)})
    with pytest.raises(PermanentError, match="does not say that it is that content"):
        await Images(engine, policy(digests={"a:1": ONE})).before_create("a:1")


async def test_a_loaded_image_is_known_by_its_id() -> None:
    engine = Engine({"a:1": image("a:1")})
    images = Images(engine, policy(pull="never", digests={"a:1": ONE}))
    assert await images.before_create("a:1") == ONE
    assert await images.before_create(f"a@{ONE}") == ONE


async def test_the_digest_of_an_image_of_another_name_opens_no_door() -> None:
    engine = Engine({"secret/tool:1": image("secret/tool:1")})
    with pytest.raises(NotFound):
        await Images(engine, policy(pull="never", allow=["game/*"])).ensure(f"game/a@{ONE}")


async def test_a_pull_says_how_far_it_is_and_when_it_is_over() -> None:
    told: list[tuple[int, int, str]] = []
    engine = Engine({}, {"a:1": image("a:1")})
    await Images(engine, policy()).ensure("a:1", tell=lambda *words: told.append(words))
    assert told == [(10, 100, "pulling a:1"), (100, 100, "pulling a:1"), (0, 0, "")]


async def test_a_pull_says_how_fast_it_is_once_that_can_be_told() -> None:
    class Slow(Engine):
        async def pull_image(self, image: str, *, on_progress: Any = None) -> ImageInfo:
            on_progress(1_000_000, 9_000_000)  # was there before it was looked at: no part of the rate
            await asyncio.sleep(0.6)
            on_progress(4_000_000, 9_000_000)
            await asyncio.sleep(0.6)
            return await super().pull_image(image, on_progress=on_progress)

    told: list[tuple[int, int, str]] = []
    begun = time.monotonic()
    await Images(Slow({}, {"a:1": image("a:1")}), policy()).ensure("a:1", tell=lambda *words: told.append(words))
    took_s = time.monotonic() - begun
    assert told[0] == (1_000_000, 9_000_000, "pulling a:1")
    done, total, message = told[1]
    rate = re.fullmatch(r"pulling a:1 at (\d+\.\d) MB/s", message)
    assert (done, total) == (4_000_000, 9_000_000)
    assert rate is not None
    assert 3 / took_s - 0.1 <= float(rate[1]) <= 3 / 0.6 + 0.1


async def test_what_the_policy_refuses_is_refused_here_too() -> None:
    with pytest.raises(OutriderError, match="does not allow the image evil/x:1"):
        await Images(Engine({}), policy(allow=["game/*"])).ensure("evil/x:1")
