"""A machine of the tests' own that is run by systemd: a container with its own PID 1 and its own container engine.

Its image is a small system of this machine's release, made once by debootstrap and kept under the digest of its recipe.
Outrider is put in as an operator would have it, in an environment of its own beneath /opt; what it depends on is the
environment that runs the tests, mounted read-only.
"""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outrider.cli.imagebuild import base, engine
from outrider.cli.imagebuild.shell import Progress

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "systemd,systemd-sysv,procps,python3,ca-certificates,docker.io,iptables,nftables"
RELEASE = platform.freedesktop_os_release()
SUITE = RELEASE["VERSION_CODENAME"]
COMPONENTS = "main,universe" if RELEASE["ID"] == "ubuntu" else "main"
_DIGEST = hashlib.sha256("\n".join(("1", SUITE, PACKAGES, COMPONENTS)).encode()).hexdigest()[:12]
IMAGE = f"outrider-test/systemd:{SUITE}-{_DIGEST}"
STEP_IMAGES = ("outrider/base:1", "outrider/pause:1", "outrider/step-container:0.1.0")

# A machine whose control groups are its own, to write to, and nobody else's: a namespace of them, in which the kernel
# lets it mount no hierarchy that this machine has not, and change none. (systemd would, and others here would notice.)
# Mounts are seen everywhere in it, as systemd sees to on a machine proper and leaves to whoever makes a container:
# credentials reach services that way. The unified hierarchy of a hybrid machine has no group of this container's.
BOOT = """
mount --make-rshared /
for each in /sys/fs/cgroup /sys/fs/cgroup/*; do
    if mountpoint -q "$each"; then mount -o remount,rw,bind "$each"; fi
done
exec /lib/systemd/systemd systemd.legacy_systemd_cgroup_controller=1
"""

CODE = ("outrider", "agent_core", "server_core")
_SITE, _SRC = "/opt/test-site", "/opt/test-src"


class Box:
    """One such machine, running."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *command: object, stdin: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program on it, as root."""
        given = ["docker", "exec", "--interactive", self.name, *map(str, command)]
        return subprocess.run(given, input=stdin, capture_output=True, text=True, timeout=timeout)

    def ok(self, *command: object, stdin: str = "", timeout: float = 60) -> str:
        """Run a program that must succeed; its standard output."""
        done = self.run(*command, stdin=stdin, timeout=timeout)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.outrider()}"
        return done.stdout

    def json(self, *command: object) -> Any:
        """What an `outrider` command says, as JSON."""
        return json.loads(self.ok("outrider", *command, "-o", "json"))

    def write(self, path: str, content: str) -> None:
        self.ok("sh", "-c", f"mkdir -p {Path(path).parent} && cat > {path}", stdin=content)

    def show(self, unit: str, what: str) -> str:
        """A property of a unit."""
        return self.ok("systemctl", "show", "--property", what, "--value", unit).strip()

    def journal(self, unit: str = "", lines: int = 40) -> str:
        """The last lines that a unit, or the machine, wrote."""
        which = ["--unit", unit] if unit else []
        return self.run("journalctl", "--no-pager", "--output", "cat", "--lines", str(lines), *which).stdout

    def outrider(self) -> str:
        """The last words of both services."""
        return "\n".join(self.journal(f"outrider-{part}.service") for part in ("server", "agent"))

    def until(self, holds: Callable[[], bool], seconds: float = 60, every: float = 0.2) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"it did not come to hold within {seconds:g} s\n{self.outrider()}"
            time.sleep(every)

    def install(self, number: int, version: str = "") -> None:
        """Put Outrider into /opt/outrider-``number``, as pip would, and let /opt/outrider lead there.

        ``version``: what it says of itself, to tell an upgrade.
        """
        venv = f"/opt/outrider-{number}"
        site = f"{venv}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        paths = [_SITE, *(f"{_SRC}/{each.relative_to(ROOT)}" for each in sorted(ROOT.glob("plugins/*/")))]
        start = f"#!{venv}/bin/python\nimport sys\nfrom outrider.cli import main\nsys.exit(main())\n"
        rename = f"sed -i 's/^__version__ = .*/__version__ = \"{version}\"/' {site}/outrider/__init__.py"
        self.ok(
            "sh", "-ec",
            f"""
            {_python()} -m venv --without-pip {venv}
            cp -a {' '.join(f"{_SRC}/{each}" for each in CODE)} {site}
            {rename if version else ":"}
            printf '%s\\n' {' '.join(paths)} > {site}/test-dependencies.pth
            cat > {venv}/bin/outrider
            chmod 755 {venv}/bin/outrider
            ln -sfn outrider-{number} /opt/outrider
            ln -sfn /opt/outrider/bin/outrider /usr/local/bin/outrider
            """,
            stdin=start,
        )  # fmt: skip


@contextmanager
def systemd_box() -> Iterator[Box]:
    """A machine that has booted, with the images that any step needs and Outrider in /opt/outrider-1."""
    build_image()
    before = _control_groups()
    box = Box(f"outrider-test-systemd-{secrets.token_hex(4)}")
    create = ["docker", "create", "--name", box.name, *_options(), IMAGE, "sh", "-ec", BOOT]
    made = subprocess.run(create, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    try:
        subprocess.run(["docker", "start", box.name], check=True, capture_output=True)
        box.until(lambda: box.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"))
        assert _control_groups() == before, "the box has changed the machine's control groups"
        saved = subprocess.Popen(["docker", "save", *STEP_IMAGES], stdout=subprocess.PIPE)
        load = ["docker", "exec", "--interactive", box.name, "docker", "load"]
        subprocess.run(load, stdin=saved.stdout, check=True, capture_output=True)
        assert saved.stdout is not None
        saved.stdout.close()
        assert saved.wait() == 0
        # An interpreter with a shared library looks for it where it was built for.
        box.write("/etc/ld.so.conf.d/test-python.conf", f"{_python_home()[1]}/lib\n")
        box.ok("ldconfig")
        box.install(1)
        yield box
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", box.name], capture_output=True)


def _control_groups() -> list[str]:
    """The hierarchies of control groups that this machine has, and how they are mounted."""
    mounted = [line for line in Path("/proc/self/mounts").read_text().splitlines() if " /sys/fs/cgroup" in line]
    return sorted([line.split(":")[1] for line in Path("/proc/self/cgroup").read_text().splitlines()]) + mounted


def build_image() -> None:
    """Make the image, unless the engine has it."""
    if not engine.inspect([IMAGE]):
        progress = Progress(1)
        with progress.task(IMAGE):
            base.bootstrap(IMAGE, SUITE, PACKAGES, progress, components=COMPONENTS)


def _python() -> str:
    return f"{_python_home()[1]}/bin/python{sys.version_info.major}.{sys.version_info.minor}"


def _python_home() -> tuple[Path, str]:
    """Where the interpreter of these tests lives, and where it does there."""
    home = Path(sys.base_prefix).resolve()
    # What lies in a home would be hidden from the services, as it should be.
    return home, "/opt/test-python" if home.is_relative_to("/root") or home.is_relative_to("/home") else str(home)


def _capabilities() -> list[str]:
    """All that systemd and an engine need. SYS_RESOURCE is left out: not every machine may give it away.

    Where this one may not, engines before 23 would all the same, and later ones refuse to leave out what is not there.
    """
    bounding = int(Path("/proc/self/status").read_text().partition("CapBnd:")[2].split()[0], 16)
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    version = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    is_there = bool(bounding >> 24 & 1)
    dropped = ["--cap-drop", "SYS_RESOURCE"] if is_there or int(version.partition(".")[0]) < 23 else []
    return ["--cap-add", "ALL", *dropped]


def _options() -> list[str]:
    home, there = _python_home()
    mounts = {ROOT: _SRC, Path(sysconfig.get_path("purelib")): _SITE}
    if there != "/usr":
        mounts[home] = there
    return [
        *_capabilities(),
        "--security-opt", "seccomp=unconfined",
        "--security-opt", "apparmor=unconfined",
        "--security-opt", "systempaths=unconfined",
        "--device-cgroup-rule", "a *:* rwm",
        "--cgroupns", "private",
        "--tmpfs", "/run:exec,mode=755", "--tmpfs", "/run/lock", "--tmpfs", "/tmp",
        "--volume", "/var/lib/docker",
        "--env", "container=docker", "--stop-signal", "SIGRTMIN+3", "--hostname", "box",
        "--label", "outrider.test=systemd",
        *(option for source, target in mounts.items() for option in ("--volume", f"{source}:{target}:ro")),
    ]  # fmt: skip
