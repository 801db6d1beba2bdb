"""The distributions of tests/plugins, each broken in one way (`good` in none), put into a directory for imports.

`install` does what an installer does: the module, and beside it the ``.dist-info`` that its pyproject.toml comes to.
That the two are the same is what tests/integration/test_plugin_fixtures.py builds and installs them for.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

FIXTURES = Path(__file__).parent / "plugins"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir() and any(path.iterdir()))


def install(site: Path, *names: str) -> Path:
    """Put these fixtures into ``site``, which is to be on `sys.path`. Returns it."""
    site.mkdir(parents=True, exist_ok=True)
    for name in names:
        folder = FIXTURES / name
        if not (folder / "pyproject.toml").exists():  # metadata that no tool would write
            shutil.copytree(folder, site, dirs_exist_ok=True)
            continue
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        for module in folder.glob("*.py"):
            shutil.copy(module, site)
        info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\nRequires-Dist: outrider\n"
        )
        lines = [f"{key} = {value}" for key, value in project["entry-points"]["outrider.steps"].items()]
        (info / "entry_points.txt").write_text("\n".join(["[outrider.steps]", *lines, ""]))
    return site
