"""Wheels of the tests' own making, and this checkout as wheels: what an environment is made of without an index."""

from __future__ import annotations

import base64
import hashlib
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_OURS = ("outrider", "_outrider", "agent_core", "server_core", "__editable__", "_editable_impl")


def write_wheel(
    folder: Path,
    name: str,
    version: str,
    files: Mapping[str, str | bytes],
    *,
    entry_points: Mapping[str, Mapping[str, str]] | None = None,
    requires: Iterable[str] = (),
    extras: Iterable[str] = (),
) -> Path:
    """A pure wheel (PEP 427) with these files; ``entry_points``: group to name to value."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Provides-Extra: {each}" for each in extras] + [f"Requires-Dist: {each}" for each in requires]
    groups = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
        for group, entries in (entry_points or {}).items()
    ]
    contents = {path: content.encode() if isinstance(content, str) else content for path, content in files.items()}
    contents[f"{info}/METADATA"] = "\n".join([*metadata, ""]).encode()
    contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{info}/entry_points.txt"] = "\n".join(groups).encode()
    record = "".join(f"{path},sha256={_record_hash(content)},{len(content)}\n" for path, content in contents.items())
    contents[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for member, content in contents.items():
            archive.writestr(member, content)
    return path


def outrider_wheel(folder: Path, version: str, changed: Mapping[str, str] | None = None) -> Path:
    """This checkout's `outrider`, as ``version``; ``changed``: what is added to the end of files."""
    files = _package_files(ROOT, ("outrider", "agent_core", "server_core"))
    files["outrider/__init__.py"] = files["outrider/__init__.py"].replace(b'"0.1.0"', f'"{version}"'.encode())
    for path, text in (changed or {}).items():
        files[path] += text.encode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    extras = ("agent", "cli")
    return write_wheel(
        folder, "outrider", version, files, entry_points=groups, requires=["test-dependencies"], extras=extras
    )


def plugin_wheel(folder: Path, plugin: str) -> Path:
    """One of this checkout's plugins."""
    place = ROOT / "plugins" / plugin
    project = tomllib.loads((place / "pyproject.toml").read_text())["project"]
    files = _package_files(place, (f"outrider_step_{plugin}",))
    return write_wheel(folder, project["name"], project["version"], files, entry_points=project["entry-points"])


def dependencies_wheel(folder: Path) -> Path:
    """What Outrider depends on, as the environment has it that runs these tests: a path to all of it but Outrider."""
    farm = folder / "site"
    farm.mkdir()
    for key in ("purelib", "platlib"):
        for each in Path(sysconfig.get_path(key)).iterdir():
            link = farm / each.name
            if not each.name.startswith(_OURS) and each.suffix != ".pth" and not link.is_symlink():
                link.symlink_to(each)
    return write_wheel(folder, "test-dependencies", "1", {"test_dependencies.pth": f"{farm}\n"})


def lock_of(*wheels: Path) -> str:
    """A lock of exactly these files."""
    lines = []
    for wheel in wheels:
        name, version, *_ = wheel.name.split("-")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{name.replace('_', '-')}=={version} \\\n    --hash=sha256:{digest}\n")
    return "".join(lines)


def _package_files(root: Path, packages: Iterable[str]) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for package in packages
        for path in sorted((root / package).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
