"""The container engine, through its command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from outrider.cli.imagebuild.shell import BuildError, run

CONTENT_LABEL = "outrider.content"
"""The digest of everything that an image was made of. An image that bears the wanted one is not built again."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image that the engine has."""

    id: str
    labels: Mapping[str, str]
    size_bytes: int
    platform: str = ""  # "linux/amd64"


def check() -> None:
    """Raise BuildError, with what would help, unless an engine answers."""
    if shutil.which("docker") is None:
        raise BuildError("there is no container engine on this machine: run scripts/engine.sh start")
    try:
        answer = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, timeout=30
        )
    except subprocess.TimeoutExpired:
        raise BuildError("the container engine did not answer for 30 s: run scripts/engine.sh status") from None
    if answer.returncode != 0:
        if "permission denied" in answer.stderr.lower():
            raise BuildError("this user may not speak to the container engine: run the build with sudo")
        last = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BuildError(f"the container engine does not answer ({last}): run scripts/engine.sh start")


def inspect(tags: Sequence[str]) -> dict[str, Image]:
    """Those of ``tags`` that the engine has, by tag, in a single call."""
    if not tags:
        return {}
    answer = subprocess.run(["docker", "image", "inspect", *tags], capture_output=True, text=True, timeout=60)
    try:
        # Exit code 1 only says that some are missing; the others stand in the output all the same.
        documents = json.loads(answer.stdout or "[]")
    except ValueError:
        raise BuildError(f"the container engine can't list images: {answer.stderr.strip()}") from None
    if not documents and "no such image" not in answer.stderr.lower():
        check()
    found = {}
    for document in documents:
        platform = f"{document.get('Os', '')}/{document.get('Architecture', '')}"
        labels = (document.get("Config") or {}).get("Labels") or {}
        image = Image(document["Id"], labels, document["Size"], platform)
        found.update({tag: image for tag in document.get("RepoTags") or [] if tag in tags})
    return found


def build(
    tag: str,
    context: Path,
    *,
    arguments: Mapping[str, str],
    content: str,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Build ``context`` as ``tag``, without a network and without looking for anything outside this machine."""
    command = ["docker", "build", "--network", "none", "--force-rm", "--label", f"{CONTENT_LABEL}={content}"]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    before = inspect([tag]).get(tag)
    # The classic builder is in every engine, needs no plugin, and takes images of the engine itself as a base.
    run(
        [*command, "--tag", tag, str(context)],
        what=f"building {tag}",
        on_line=_steps_alone(on_line),
        env={"DOCKER_BUILDKIT": "0"},
    )
    after = inspect([tag]).get(tag)
    if before is not None and after is not None and before.id != after.id:
        # Ours, and nameless now. Where a container still uses it, the engine refuses: then it stays.
        subprocess.run(["docker", "image", "rm", before.id], capture_output=True, timeout=60)


def build_layer(context: Path, *, base: str, what: str) -> str:
    """Build ``context`` on ``base`` with this machine's network, under no name; the id of the image.

    It stays as long as an image that stands on it.
    """
    command = ["docker", "build", "--network", "host", "--force-rm", "--build-arg", f"BASE={base}", str(context)]
    output = run(command, what=what, env={"DOCKER_BUILDKIT": "0"})
    match = re.search(r"Successfully built ([0-9a-f]+)", output)
    if match is None:
        raise BuildError(f"{what}: the container engine does not say which image it made")
    return match[1]


def _steps_alone(on_line: Callable[[str], None] | None) -> Callable[[str], None] | None:
    """``on_line`` for the lines that tell a person something: ``Step 3/9 : COPY lib …``, no digests."""
    if on_line is None:
        return None
    say = on_line
    return lambda line: say(line) if line.startswith("Step ") else None


def pull(image: str, on_line: Callable[[str], None] | None = None) -> bool:
    """Pull ``image``; False where no registry has it, can be reached, or says anything for a while."""
    try:
        run(["docker", "pull", image], what=f"pulling {image}", silence_s=20, on_line=on_line)
    except BuildError:
        return False
    return True


def import_tree(tree: Path, tag: str, exclude: Sequence[str], prefix: Sequence[str]) -> None:
    """Make an image of the directory ``tree`` without what ``exclude`` names (patterns of GNU tar).

    ``prefix`` stands before tar's command: the tree belongs to root.
    """
    pack = [*prefix, "tar", "-C", str(tree), "--numeric-owner", *(f"--exclude={p}" for p in exclude), "-cf", "-", "."]
    reader, writer = os.pipe()
    with (
        open(reader, "rb") as source,
        open(writer, "wb") as sink,
        subprocess.Popen(pack, stdout=sink, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as tar,
    ):
        sink.close()
        answer = subprocess.run(["docker", "import", "-", tag], stdin=source, capture_output=True, text=True)
        source.close()
        complaint = tar.stderr.read().decode(errors="replace") if tar.stderr else ""
    if answer.returncode != 0 or tar.returncode != 0:
        reason = answer.stderr.strip() or complaint.strip()
        raise BuildError(f"the tree of {tag} could not be handed to the container engine: {reason}")


def platform() -> str:
    """What the engine's machine is: ``linux/amd64``."""
    return run(
        ["docker", "version", "--format", "{{.Server.Os}}/{{.Server.Arch}}"], what="asking the engine what it runs on"
    ).strip()


def save(tags: Sequence[str]) -> Iterator[bytes]:
    """The images ``tags`` as the engine's archive, in chunks; layers that they share once."""
    with subprocess.Popen(
        ["docker", "save", *tags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            while chunk := process.stdout.read(2**20):
                yield chunk
            complaint = process.stderr.read().decode(errors="replace").strip()
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise BuildError(f"the container engine can't save {', '.join(tags)}: {complaint or 'no reason given'}")


def load(chunks: Iterator[bytes]) -> None:
    """Hand an archive of `save` to the engine. If ``chunks`` raises, the engine gets no end and loads nothing."""
    with subprocess.Popen(
        ["docker", "load", "--quiet"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            with suppress(BrokenPipeError):  # then it says why
                for chunk in chunks:
                    process.stdin.write(chunk)
                process.stdin.close()
            complaint = process.stderr.read().decode(errors="replace").strip()
        except BaseException:
            process.kill()
            with suppress(BrokenPipeError):
                process.stdin.close()
            raise
    if process.returncode != 0:
        raise BuildError(f"the container engine can't load the images: {complaint or 'no reason given'}")


def python_of(tag: str) -> dict[str, str]:
    """The Python inside an image: ``version`` ("3.11"), ``machine`` ("x86_64"), ``libc`` ("2.36")."""
    program = (
        "import json, platform, sys; print(json.dumps({'version': '%d.%d' % sys.version_info[:2],"
        " 'machine': platform.machine(), 'libc': platform.libc_ver()[1]}))"
    )
    answer = run(
        ["docker", "run", "--rm", "--network", "none", "--label", "outrider.build=1", tag, "python3", "-c", program],
        what=f"asking {tag} for its Python",
    )
    values: dict[str, str] = json.loads(answer.strip().splitlines()[-1])
    return values
