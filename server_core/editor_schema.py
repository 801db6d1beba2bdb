"""The JSON Schema of the pipelines that this server's nodes can run, for editors."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, select

from outrider.errors import NotFound
from outrider.schema import StepTypeSpec, pipeline_schema
from outrider.v1 import types_pb2
from server_core import checks
from server_core.store import nodes, schema

_NAMED = 5  # nodes that a description names


@dataclass(frozen=True, slots=True)
class Offer:
    """What nodes have reported, the same each: their names, and the step types."""

    node_ids: tuple[str, ...]
    described: bytes


def offers(connection: Connection, node_id: str, role: str) -> tuple[list[Offer], list[str]]:
    """What the chosen nodes have reported, each report once, and the names of all env sets.

    NotFound if there is no such node, or none with this role.
    """
    table = schema.nodes.c
    query = select(table.node_id, table.role, table.described).order_by(table.node_id)
    if node_id:
        nodes.get(connection, node_id)
        query = query.where(table.node_id == node_id)
    rows = connection.execute(query).all()
    chosen = [row for row in rows if not role or row.role == role]
    if role and not chosen:
        roles = sorted({row.role for row in rows if row.role})
        hint = nodes.listing("nodes have the roles", roles) if roles else "no node has a role"
        raise NotFound(f"there is no node with the role {role}", code="unknown_role", hint=hint)
    same: defaultdict[bytes, list[str]] = defaultdict(list)
    for row in chosen:
        same[row.described].append(row.node_id)
    names = connection.execute(select(schema.env_sets.c.name).order_by(schema.env_sets.c.name)).scalars()
    return [Offer(tuple(node_ids), described) for described, node_ids in same.items()], list(names)


def build(found: list[Offer], env_sets: list[str]) -> dict[str, Any]:
    """The schema with every step type that stands in ``found``; takes a while for many."""
    types: defaultdict[str, list[tuple[StepTypeSpec, list[str]]]] = defaultdict(list)
    for offer in found:
        node = types_pb2.Node.FromString(offer.described)
        for name, spec in checks.step_types(node).items():
            for known, node_ids in types[name]:
                if (known.params_schema, known.envs) == (spec.params_schema, spec.envs):
                    node_ids.extend(offer.node_ids)
                    break
            else:
                types[name].append((spec, list(offer.node_ids)))
    described = {name: _described(variants) for name, variants in types.items()}
    return pipeline_schema(described, env_sets=env_sets, complete=True)


def _described(variants: list[tuple[StepTypeSpec, list[str]]]) -> list[StepTypeSpec]:
    """The newest first; where there are several, each says whose it is."""
    if len(variants) == 1:
        return [variants[0][0]]
    result = []
    for spec, node_ids in sorted(variants, key=lambda variant: _number(variant[0].version), reverse=True):
        more = f" and {len(node_ids) - _NAMED} more" if len(node_ids) > _NAMED else ""
        where = f"{spec.distribution} {spec.version}, on {', '.join(sorted(node_ids)[:_NAMED])}{more}"
        result.append(replace(spec, description=f"{spec.description or spec.name} ({where})"))
    return result


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version))
