"""How nodes stand to their roles, and why one can't run a pipeline: sentences with the fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from packaging.utils import canonicalize_name
from sqlalchemy import Connection

from outrider._suggest import did_you_mean
from outrider.roles import AGENT, Installed, Role, Stand, by_distribution, compare, read_lock
from outrider.schema import KNOWN_DISTRIBUTIONS
from outrider.v1 import types_pb2
from server_core.store import node_roles, nodes
from server_core.store.nodes import listing

_TOLD = 4
"""So many differences are named in a sentence; a table has them all."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A role that is ready to be compared with: reading a lock costs more than comparing."""

    role: Role
    lock: Mapping[str, Sequence[str]]
    lock_sha256: bytes
    version: int

    @classmethod
    def of(cls, role: types_pb2.NodeRole) -> Wanted:
        return cls(node_roles.spec(role), read_lock(role.lock.decode()), role.lock_sha256, role.version)


def all_wanted(connection: Connection) -> dict[str, Wanted]:
    """Every role of the server, by name."""
    return {role.name: Wanted.of(role) for role in node_roles.listed(connection)}


def describe(node: types_pb2.Node, wanted: Wanted | None) -> types_pb2.Node:
    """Put onto a node's record how it stands to its role; without one, what it has. Needs its plugins."""
    state = node.role_state
    state.role = node.role
    if not node.role:
        there = by_distribution(installed(node)) if node.epoch else {}
        state.plugins.extend(
            types_pb2.PluginState(distribution=name, actual=each.version) for name, each in there.items()
        )
        return node
    if wanted is None:
        state.drift = True
        state.problem = (
            f"the server has no node role {node.role}: `outrider node role set FILE` makes it, "
            f"`outrider node role assign {node.node_id} ROLE` gives the node another one"
        )
        return node
    state.role_version = wanted.version
    if not node.epoch:
        state.drift = True
        state.problem = "its agent has never connected, so nobody knows which plugins it has"
        return node
    stands = compare(wanted.role, wanted.lock, installed(node))
    state.plugins.extend(_state(each) for each in stands)
    differing = [each.words for each in stands if each.drift]
    if not differing and node.environment.name and node.environment.lock_sha256 != wanted.lock_sha256:
        # What plugins need stands in the lock, too, and nowhere else.
        made_from = f"version {node.environment.role_version} of role {node.environment.role}"
        differing = [f"its environment was made from the lock of {made_from}, and there is a later one"]
    state.drift = bool(differing)
    if differing:
        state.problem = f"{_some(differing)}: {_fix(stands)}"
        if node.environment.refused:
            state.problem += f" (the last try was taken back: {node.environment.refused_reason})"
    return node


def installed(node: types_pb2.Node) -> Iterable[Installed]:
    """The agent and the plugins that the node has reported."""
    yield Installed(AGENT, node.agent_version)
    for plugin in node.plugins:
        yield _reported(plugin)


def _reported(plugin: types_pb2.Plugin) -> Installed:
    return Installed.reported(
        plugin.distribution,
        plugin.version,
        ok=plugin.ok,
        state=plugin.state,
        error=plugin.error,
        notes=plugin.notes,
    )


def _fix(stands: Iterable[Stand]) -> str:
    """`sync` makes everything as it should be, except what the node's own settings say."""
    if {each.drift for each in stands if each.drift} == {"disabled"}:
        return "enable it in the agent's settings there, or take it out of the role"
    return "on the node, run `outrider agent plugins sync`"


def why_missing(connection: Connection, node: types_pb2.Node, uses: Iterable[str]) -> dict[str, str]:
    """For each step type of ``uses`` that the node lacks, what would be right, as a hint."""
    have = {each.name for each in node.step_types}
    missing = sorted(set(uses) - have)
    if not missing:
        return {}
    found = node_roles.find(connection, node.role) if node.role else None
    wanted = None if found is None else Wanted.of(found)
    others = [each for each in nodes.listed(connection) if each.node_id != node.node_id]
    return {each: hint for each in missing if (hint := _why(each, node, wanted, others))}


def _why(uses: str, node: types_pb2.Node, wanted: Wanted | None, others: Sequence[types_pb2.Node]) -> str:
    """Empty where nothing better is known than what every machine could say."""
    prefix = uses.split(".")[0]
    for plugin in node.plugins:
        if not plugin.ok and (plugin.name == prefix or uses in plugin.step_types):
            return _not_used(_reported(plugin))
    owners = {other.node_id: each for other in others for each in other.step_types if each.name == uses}
    sources = (each.distribution for each in owners.values() if each.distribution)
    distribution = canonicalize_name(next(sources, "") or _likely(prefix, node, wanted, others))
    if not distribution:
        return _candidates(uses, node, wanted)
    there = by_distribution(installed(node)).get(distribution)
    if there is None:
        return _not_there(distribution, node, wanted, owners)
    return _not_used(there) if there.error or there.disabled else _not_in(there, distribution, node, wanted, owners)


def _likely(prefix: str, node: types_pb2.Node, wanted: Wanted | None, others: Iterable[types_pb2.Node]) -> str:
    """The distribution that step types of this prefix come from, by what is known; empty: nobody knows."""
    for each in node.step_types:
        if each.name.startswith(f"{prefix}."):
            return each.distribution
    for plugin in (plugin for other in others for plugin in other.plugins):
        if plugin.name == prefix and plugin.version:
            return plugin.distribution
    if prefix in KNOWN_DISTRIBUTIONS:
        return KNOWN_DISTRIBUTIONS[prefix]
    named = wanted.role.plugins if wanted is not None else {}
    return next((each for each in named if f"-{each}".endswith(f"-{canonicalize_name(prefix)}")), "")


def _not_used(there: Installed) -> str:
    what = f"{there.distribution} {there.version} is there"
    return f"{what} and disabled: {there.disabled}" if not there.error else f"{what} and can't be used: {there.error}"


def _not_there(
    distribution: str, node: types_pb2.Node, wanted: Wanted | None, owners: Mapping[str, types_pb2.StepTypeInfo]
) -> str:
    elsewhere = f"; {listing('it can run on', owners)}" if owners else ""
    if wanted is None:
        return (
            f"it comes from {distribution}, which is to be installed there: give the node a role that has it "
            f"(`outrider node role assign {node.node_id} ROLE`){elsewhere}"
        )
    if distribution in wanted.role.plugins:
        versions = wanted.role.plugins[distribution]
        return (
            f"it comes from {distribution}{versions and f' ({versions})'}, which role {node.role} has and the node "
            f"has not yet: run `outrider agent plugins sync` there"
        )
    return (
        f"it comes from {distribution}, which role {node.role} does not have: add it there (`outrider node role set`) "
        f"and run `outrider agent plugins sync` on the node{elsewhere}"
    )


def _not_in(
    there: Installed,
    distribution: str,
    node: types_pb2.Node,
    wanted: Wanted | None,
    owners: Mapping[str, types_pb2.StepTypeInfo],
) -> str:
    """The distribution is there and well, and has no such step type: it is another version than is needed."""
    stands = [] if wanted is None else compare(wanted.role, wanted.lock, [there])
    stand = next((each for each in stands if each.distribution == distribution and each.named), None)
    behind = stand is not None and stand.drift in ("version", "lock")
    if not behind and not owners:
        return ""  # a name that is wrong: the nearest is told
    words = f"it is not in {distribution} {there.version}, which the node has"
    if owners:
        words += f"; {listing('it is on', (f'{name} ({each.version})' for name, each in owners.items()))}"
    if stand is not None and behind:
        range_ = stand.locked or stand.wanted
        return f"{words}; role {node.role} has {range_}: run `outrider agent plugins sync` there"
    return f"{words}: let {f'role {node.role}' if wanted is not None else 'a role of the node'} have a version with it"


def _candidates(uses: str, node: types_pb2.Node, wanted: Wanted | None) -> str:
    """Where it may come from: a plugin that is broken can't say which step types it has."""
    there = by_distribution(installed(node))
    broken = [
        f"{each.distribution} {each.version}".strip() + f": {each.error}" for each in there.values() if each.error
    ]
    hints = []
    if broken:
        hints.append(f"it may come from what can't be used there: {_some(broken)}")
    absent = [each for each in (wanted.role.plugins if wanted is not None else ()) if each not in there]
    if absent:
        hints.append(
            f"it may come from {_some(absent)}, which role {node.role} has and the node has not yet: "
            f"run `outrider agent plugins sync` there"
        )
    near = did_you_mean(uses, [each.name for each in node.step_types])
    return "; ".join([*hints, near]) if hints and near else "; ".join(hints)


def _some(what: Sequence[str]) -> str:
    more = f" and {len(what) - _TOLD} more" if len(what) > _TOLD else ""
    return f"{'; '.join(what[:_TOLD])}{more}"


def _state(stand: Stand) -> types_pb2.PluginState:
    return types_pb2.PluginState(
        distribution=stand.distribution,
        wanted=stand.wanted,
        locked=stand.locked,
        actual=stand.actual,
        drift=stand.drift,
        named=stand.named,
    )
