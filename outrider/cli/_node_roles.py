"""`outrider node role`: what roles of nodes have, and which node has which."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from outrider.cli._files import read_text
from outrider.cli._main import App
from outrider.cli._output import age, emit_json, fields, note, output_option, table
from outrider.errors import InvalidInput, NotFound, Unavailable

_LOCKING_S = 900


@click.group("role", help="Roles of nodes, and their plugins: set, list, show, rm, lock, assign.")
def role() -> None:
    """The roles."""


@role.command("set")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--lock", "lock_file", type=click.Path(path_type=Path), help="By default, FILE's name with .lock.")
@click.option("--version", type=int, help="Refuse if the role has another version than this; 0: it must be new.")
@output_option
@click.pass_obj
def set_(app: App, file: Path, lock_file: Path | None, version: int | None, as_json: bool) -> None:
    """Make a role known to the server, or replace it, from its FILE and the lock beside it."""
    from outrider.cli._client import request_id
    from outrider.roles import check_lock, load_role, read_lock
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1 import types_pb2 as types

    wanted = load_role(read_text(file))
    lock_file = lock_file or file.with_suffix(".lock")
    if not lock_file.is_file():
        raise NotFound(
            f"there is no lock {lock_file}", code="lock_missing", hint=f"outrider node role lock {file} makes it"
        )
    lock = read_text(lock_file)
    check_lock(wanted, read_lock(lock))
    message = types.NodeRole(
        name=wanted.name,
        description=wanted.description,
        agent=wanted.agent,
        plugins=[types.RolePlugin(distribution=name, versions=each) for name, each in wanted.plugins.items()],
        lock=lock.encode(),
    )
    request = pb.SetNodeRoleRequest(request_id=request_id(), role=message, expected_version=version)
    with app.client() as client:
        answer = client.call(client.stub.SetNodeRole, request)
    if as_json:
        emit_json(answer)
        return
    nodes = f"; on each of its {len(answer.nodes)} nodes: outrider agent plugins sync" if answer.nodes else ""
    note(f"node role {answer.name} has version {answer.version}{nodes}")


@role.command("list")
@output_option
@click.pass_obj
def list_(app: App, as_json: bool) -> None:
    """List the roles of nodes."""
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        roles = client.call(client.stub.ListNodeRoles, pb.ListNodeRolesRequest()).roles
    if as_json:
        emit_json(list(roles))
        return
    rows = [
        (each.name, each.version, age(each.updated_at), len(each.nodes), " ".join(p.distribution for p in each.plugins))
        for each in roles
    ]
    table(("ROLE", "VERSION", "UPDATED", "NODES", "PLUGINS"), rows, empty="there are no node roles yet")


@role.command("show")
@click.argument("name", metavar="ROLE")
@click.option("--lock", "show_lock", is_flag=True, help="Print the lock, and nothing else.")
@output_option
@click.pass_obj
def show(app: App, name: str, show_lock: bool, as_json: bool) -> None:
    """Show a role with its plugins and nodes."""
    from outrider.roles import AGENT, read_lock
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        found = client.call(client.stub.GetNodeRole, pb.GetNodeRoleRequest(name=name))
    if show_lock:
        click.echo(found.lock.decode(), nl=False)
        return
    if as_json:
        emit_json(found)
        return
    locked = read_lock(found.lock.decode())
    fields(
        [
            ("role", found.name),
            ("description", found.description),
            ("version", str(found.version)),
            ("updated", f"{age(found.updated_at)} ago"),
            ("lock", f"{len(locked)} packages, sha256 {found.lock_sha256.hex()}"),
            ("nodes", " ".join(found.nodes)),
        ]
    )
    click.echo()
    wanted = [(AGENT, found.agent), *((each.distribution, each.versions) for each in found.plugins)]
    rows = [(each, versions or "any", " or ".join(locked.get(each, ()))) for each, versions in wanted]
    table(("DISTRIBUTION", "WANTED", "LOCKED"), rows, empty="")


@role.command("rm")
@click.argument("names", metavar="ROLE...", nargs=-1, required=True)
@output_option
@click.pass_obj
def rm(app: App, names: tuple[str, ...], as_json: bool) -> int:
    """Remove roles that no node has."""
    from outrider.cli._client import request_id
    from outrider.cli._many import each
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        return each(
            names,
            lambda name: client.call(
                client.stub.RemoveNodeRole, pb.RemoveNodeRoleRequest(request_id=request_id(), name=name)
            ),
            lambda name, _answer: f"removed node role {name}",
            as_json,
        )


@role.command("assign")
@click.argument("node_id", metavar="NODE")
@click.argument("name", metavar="ROLE")
@click.option("--version", type=int, help="Refuse if the node has another version than this.")
@output_option
@click.pass_obj
def assign(app: App, node_id: str, name: str, version: int | None, as_json: bool) -> None:
    """Give NODE another role; "" takes its role away. What it has changes with `agent plugins sync` there."""
    from outrider.cli._client import request_id
    from outrider.v1 import control_service_pb2 as pb

    request = pb.AssignNodeRoleRequest(request_id=request_id(), node_id=node_id, role=name, expected_version=version)
    with app.client() as client:
        node = client.call(client.stub.AssignNodeRole, request)
    if as_json:
        emit_json(node)
        return
    note(f"node {node_id} has {f'the role {node.role}' if node.role else 'no role'} (version {node.version})")
    if node.role_state.problem:
        note(node.role_state.problem)


@role.command("lock")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--find-links", type=click.Path(path_type=Path, exists=True), help="A directory of wheels, too.")
@click.option("--no-index", is_flag=True, help="Look nowhere but in --find-links.")
@click.option("--index-url", metavar="URL", help="The index to ask, instead of uv's own.")
@click.option("--python-version", default="3.11", show_default=True, help="The oldest Python of the nodes.")
@click.option("--upgrade", is_flag=True, help="Take the newest versions instead of those that are locked.")
@output_option
def lock(
    file: Path,
    find_links: Path | None,
    no_index: bool,
    index_url: str | None,
    python_version: str,
    upgrade: bool,
    as_json: bool,
) -> None:
    """Resolve a role's FILE into the lock beside it: every package with its version and the hashes of its files.

    One lock serves nodes of any machine and Python; no server is needed.
    """
    from outrider.roles import check_lock, load_role, read_lock

    wanted = load_role(read_text(file))
    target = file.with_suffix(".lock")
    options = ["--universal", "--python-version", python_version, "--generate-hashes", "--no-build"]
    options += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--no-config", "--quiet"]
    options += ["--upgrade"] if upgrade else []
    options += ["--find-links", str(find_links.absolute())] if find_links else []
    options += ["--no-index"] if no_index else []
    options += ["--index-url", index_url] if index_url else []
    draft = target.with_name(f".{target.name}.new")
    try:
        draft.write_text(target.read_text(encoding="ascii") if target.exists() else "", encoding="ascii")
        _uv(["pip", "compile", "-", *options, "--output-file", str(draft.absolute())], wanted.requirements(), file)
        text = draft.read_text(encoding="ascii")
        check_lock(wanted, read_lock(text))
        made_from = (
            f"# Made from {file.name} by: outrider node role lock {file.name}. Change that file, not this one.\n"
        )
        draft.write_text(made_from + text, encoding="ascii")
        draft.replace(target)
    except OSError as error:
        raise InvalidInput(f"the lock {target} can't be written: {error.strerror}", code="lock_not_written") from error
    finally:
        draft.unlink(missing_ok=True)
    packages = read_lock(text)
    if as_json:
        emit_json({"lock": str(target), "packages": {name: list(versions) for name, versions in packages.items()}})
    else:
        note(f"{target} has {len(packages)} packages")


def _uv(arguments: Sequence[str], requirements: Sequence[str], file: Path) -> None:
    """Run uv, which resolves for all machines at once. Raises NotFound without it, Unavailable with its last words."""
    beside = Path(sys.executable).with_name("uv")
    if importlib.util.find_spec("uv"):
        command = [sys.executable, "-m", "uv"]
    elif beside.is_file() or shutil.which("uv"):
        command = [str(beside) if beside.is_file() else str(shutil.which("uv"))]
    else:
        raise NotFound("locks are made with uv, which is not installed", code="uv_missing", hint="pip install uv")
    text = "".join(f"{each}\n" for each in requirements)
    try:
        done = subprocess.run(
            [*command, *arguments], input=text, capture_output=True, text=True, timeout=_LOCKING_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"resolving {file} took longer than {_LOCKING_S} s", code="lock_timeout") from error
    if done.returncode != 0:
        words = " ".join(done.stderr.split())[-1500:]
        raise InvalidInput(f"{file} can't be resolved: {words}", code="not_resolved")
