"""`outrider plugin new`, `resolve`, `try` and `schema`: for those who write step plugins; none needs a server."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outrider.cli._files import read_bytes
from outrider.cli._main import DONE, FAILED, TIMED_OUT
from outrider.cli._output import emit_json, note, output_option
from outrider.cli._values import Duration

if TYPE_CHECKING:
    from agent_core.onestep import GivenVolume, StepRequest
    from agent_core.plugins import PluginHost, RegisteredStepType
    from agent_core.policy import NodePolicy

_PATH = click.Path(path_type=Path)


def _step_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.argument("step_type", metavar="TYPE"),
            click.option(
                "--with",
                "file",
                type=click.Path(path_type=Path, allow_dash=True),
                metavar="FILE",
                help="The parameters, a mapping in YAML (- is stdin); without it there are none.",
            ),
            click.option(
                "--volume",
                "volumes",
                multiple=True,
                metavar="NAME=DIR[:PATH][:ro|:rw]",
                help="A directory as a volume, at PATH (/NAME); read-only unless the parameters write below it.",
            ),
            click.option("--policy-file", type=_PATH, help="What the node allows; without it, the defaults."),
        ]
    ):
        function = option(function)
    return function


@click.command("new")
@click.argument("name")
@click.option("--directory", type=_PATH, metavar="DIR", help="Where to make it.  [default: outrider-step-NAME]")
@click.option(
    "--language",
    type=click.Choice(["python", "sh"]),
    default="python",
    show_default=True,
    help="What the step's program is written in.",
)
@output_option
def new(name: str, directory: Path | None, language: str, as_json: bool) -> int:
    """Make the project of a new step plugin called NAME, with a step type NAME.list that works.

    It has everything to be published: plugin module, step program, image, tests with the conformance kit, README, CI.
    """
    from outrider.cli._scaffold import make

    folder, files = make(name, directory, language)
    if as_json:
        emit_json({"folder": str(folder), "files": files})
    else:
        for file in files:
            click.echo(str(folder / file))
    note(f"made {folder}, the step plugin {name!r} with the step type {name}.list; now:")
    note(f"  cd {folder}")
    note("  pip install -e '.[test]' && pytest")
    return DONE


@click.command("schema")
@click.argument("step_type", metavar="[TYPE]", required=False)
@click.option("--outputs", is_flag=True, help="The schema of the outputs instead of the parameters.")
def schema(step_type: str | None, outputs: bool) -> int:
    """Print the JSON Schema of the parameters of TYPE; without TYPE, what is told to the server of every step type."""
    host = _host(step_type)
    if step_type is not None:
        found = _find(host, step_type)
        emit_json(found.outputs_schema if outputs else found.params_schema)
        return DONE
    emit_json(
        {
            name: {
                "plugin": each.plugin,
                "distribution": each.distribution,
                "version": each.version,
                "description": each.description,
                "envs": list(each.envs),
                "idempotent": each.idempotent,
                "params": each.params_schema,
                "outputs": each.outputs_schema,
            }
            for name, each in sorted(host.step_types.items())
        }
    )
    return DONE


@click.command("resolve")
@_step_options
@output_option
def resolve(
    step_type: str, file: Path | None, volumes: tuple[str, ...], policy_file: Path | None, as_json: bool
) -> int:
    """Show the plan that a step of type TYPE comes to, as a node would make it: nothing is run, nobody is asked.

    Without any --volume, each directory at the root that the parameters name is taken to be a volume.
    """
    from agent_core.onestep import plan_step

    host = _host(step_type)
    request = _request(host, step_type, file, volumes, invent=True)
    planned = plan_step(request, host, _policy(policy_file))
    told = {
        "step_type": step_type,
        "volumes": {name: f"{each.path}{':rw' if each.writable else ''}" for name, each in request.volumes.items()},
        "plan": planned.plan.model_dump(mode="json", exclude={"inputs"}, exclude_none=True),
        "inputs": planned.params if planned.plan.inputs is None else dict(planned.plan.inputs),
        "limits": planned.resources.model_dump(mode="json", exclude_none=True),
    }
    if as_json:
        emit_json(told)
    else:
        import yaml

        click.echo(yaml.safe_dump(told, sort_keys=False, allow_unicode=True).rstrip())
    return DONE


@click.command("try")
@_step_options
@click.option("--env", "envs", multiple=True, metavar="NAME[=VALUE]", help="An env; without a value, this shell's.")
@click.option(
    "--secret", "secrets", multiple=True, metavar="NAME", help="An env with this shell's value; masked in the log."
)
@click.option("--object", "object_ref", metavar="KIND/NAME", help="The object that the step is carried out for.")
@click.option("--timeout", type=Duration(), default=3600.0, metavar="D", help="The step's timeout.  [default: 1h]")
@output_option
def try_(
    step_type: str,
    file: Path | None,
    volumes: tuple[str, ...],
    policy_file: Path | None,
    envs: tuple[str, ...],
    secrets: tuple[str, ...],
    object_ref: str | None,
    timeout: float,
    as_json: bool,
) -> int:
    """Carry out a step of type TYPE on the engine of this machine, in the sandbox that a node would give it.

    Its log goes to stderr, its outputs to stdout as JSON. It runs as the owner of the first directory that it may
    write; one that does not exist is made. Containers that it starts are removed at the end. Ctrl-C cancels it.
    """
    from agent_core.onestep import plan_step
    from outrider.cli._plugin_try import carry_out

    host = _host(step_type)
    made: dict[str, Any] = {
        "envs": _env_values(envs),
        "secrets": {name: _of_shell(name, "--secret") for name in secrets},
        "object_ref": object_ref or "",
        "timeout_s": timeout,
    }
    request, policy = _request(host, step_type, file, volumes, **made), _policy(policy_file)
    plan_step(request, host, policy)  # what is wrong with it is said before anything is made
    result, took_s = carry_out(request, policy, _find(host, step_type).plugin)
    if as_json:
        emit_json(
            {
                "step_type": step_type,
                "state": result.state,
                "exit_code": result.exit_code,
                "error_class": result.error_class,
                "code": result.code,
                "message": result.message,
                "hint": result.hint,
                "outputs": dict(result.outputs),
                "took_s": round(took_s, 3),
            }
        )
    elif result.state == "succeeded":
        emit_json(dict(result.outputs))
    note(_verdict(result, took_s))
    if result.code == "step_timeout":
        return TIMED_OUT
    return DONE if result.state == "succeeded" else FAILED


COMMANDS = (new, resolve, try_, schema)
"""What `outrider plugin` has beside its own."""


def _verdict(result: Any, took_s: float) -> str:
    if result.state == "succeeded":
        return f"succeeded in {took_s:.1f}s"
    code = "" if result.exit_code is None else f", exit code {result.exit_code}"
    again = {"temporary": "; it may work when tried again"}.get(str(result.error_class or ""), "")
    hint = f" ({result.hint})" if result.hint else ""
    return f"{result.state} after {took_s:.1f}s: {result.message}{hint} [{result.code}{code}]{again}"


def _host(step_type: str | None) -> PluginHost:
    """The plugins that are installed here. What they print goes to stderr: stdout has the result.

    Of one step type, at first only the plugin that is called like it: how the others are does not matter then.
    """
    from agent_core.plugins import PluginHost

    with contextlib.redirect_stdout(sys.stderr):
        if step_type is not None:
            host = PluginHost.load([step_type.partition(".")[0]])
            if step_type in host.step_types:
                return host
        return PluginHost.load()


def _find(host: PluginHost, step_type: str) -> RegisteredStepType:
    """The step type. Raises NotFound with what there is, and what is wrong with plugins that can't be used."""
    from outrider._suggest import did_you_mean, listing
    from outrider.errors import NotFound

    found = host.step_types.get(step_type)
    if found is not None:
        return found
    for each in host.plugins:
        if each.state == "error":
            note(f"{each.name}: {each.error}")
    near = did_you_mean(step_type, host.step_types)
    hint = near or (f"there are {listing(host.step_types)}" if host.step_types else "no step plugin is installed here")
    raise NotFound(f"no plugin that is installed here has a step type {step_type}", code="unknown_step_type", hint=hint)


def _policy(file: Path | None) -> NodePolicy:
    from agent_core.policy import NodePolicy

    return NodePolicy.load(file)


def _request(
    host: PluginHost, step_type: str, file: Path | None, volumes: tuple[str, ...], *, invent: bool = False, **more: Any
) -> StepRequest:
    from agent_core.onestep import StepRequest

    registered = _find(host, step_type)
    params = {} if file is None else _parameters(file)
    read, written = _paths(registered, params)
    if volumes or not invent:
        given = dict(_volume(text, written) for text in volumes)
        if len(given) < len(volumes):
            raise click.UsageError("--volume: a name is given twice")
    else:
        given = _invented(read, written)
    return StepRequest(step_type, params, given, **more)


def _parameters(file: Path) -> dict[str, Any]:
    from outrider._yaml import MAX_BYTES, compose, kind, plain
    from outrider.errors import InvalidInput

    node, problems = compose(read_bytes(file, at_most=MAX_BYTES))
    if problems:
        raise InvalidInput(f"{file} can't be read: {'; '.join(map(str, problems))}", problems)
    if node is None:
        return {}
    params = plain(node)
    if not isinstance(params, dict):
        raise InvalidInput(f"{file} must be a mapping of parameters, not {kind(node)}", hint="NAME: VALUE, a line each")
    return params


def _paths(registered: RegisteredStepType, params: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Which paths the parameters read, and which they write."""
    from outrider.schema import marked_values

    found: dict[str, list[str]] = {"read": [], "write": []}
    for _, value, keyword, meaning in marked_values(registered.params_schema, dict(params), "with"):
        if keyword == "x-outrider-path" and isinstance(value, str):
            found[str(meaning)].append(value)
    return found["read"], found["write"]


def _volume(text: str, written: list[str]) -> tuple[str, GivenVolume]:
    """``NAME=DIR[:PATH][:ro|:rw]``."""
    from agent_core.onestep import GivenVolume

    name, equals, rest = text.partition("=")
    if not equals or not name or not rest:
        raise click.UsageError(f"--volume reads like NAME=DIR[:PATH][:ro|:rw], not {text!r}")
    mode = ""
    if rest.endswith((":ro", ":rw")):
        rest, mode = rest[:-3], rest[-2:]
    directory, colon, path = rest.rpartition(":")
    if not colon or not path.startswith("/") or not directory:
        directory, path = rest, f"/{name}"
    writable = mode == "rw" or (not mode and any(f"{each}/".startswith(f"{path}/") for each in written))
    return name, GivenVolume(Path(directory), path.rstrip("/") or "/", writable=writable)


def _invented(read: list[str], written: list[str]) -> dict[str, GivenVolume]:
    """A volume for each directory at the root that the parameters name."""
    from agent_core.onestep import GivenVolume

    tops = sorted({f"/{each.split('/')[1]}" for each in (*read, *written) if each.count("/") and each[1:2] not in "/"})
    return {
        top[1:].lower() or "root": GivenVolume(Path(), top, any(f"{each}/".startswith(f"{top}/") for each in written))
        for top in tops
    }


def _env_values(texts: tuple[str, ...]) -> dict[str, str]:
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        values[name] = value if equals else _of_shell(name, "--env")
    return values


def _of_shell(name: str, option: str) -> str:
    if name not in os.environ:
        raise click.UsageError(f"{option} {name}: this shell has no such variable")
    return os.environ[name]
