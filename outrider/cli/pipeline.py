"""`outrider pipeline`: pipelines on this machine, and what editors need to help with them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from outrider.cli._files import read_bytes, write_whole
from outrider.cli._main import App
from outrider.cli._output import emit_json, note, output_option

INVALID = 4


@click.group(name="pipeline", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Check pipelines, and help editors to write them."""


@command.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "--syntax-only", is_flag=True, help="Don't check `uses` and `with` against the step plugins installed here."
)
@output_option
def validate(file: Path, syntax_only: bool, as_json: bool) -> int:
    """Check the pipeline in FILE (- is stdin), and say everything that is wrong with it.

    Each problem is a line `FILE:LINE:COLUMN: path: message (hint)`. Exit code 0: it is valid; 4: it is not.
    """
    from outrider._yaml import MAX_BYTES
    from outrider.errors import InvalidInput
    from outrider.pipeline import load_pipeline

    problems: list[Any] = []
    pipeline = None
    text = read_bytes(file, at_most=MAX_BYTES)
    try:
        pipeline = load_pipeline(text)
    except InvalidInput as error:
        problems += error.problems
    if pipeline is not None and not syntax_only:
        from outrider.schema import check_steps, installed_step_types

        step_types, broken = installed_step_types()
        for problem in broken:
            note(f"warning: {problem}")
        problems += check_steps(pipeline, step_types)
    if as_json:
        emit_json(
            {
                "file": str(file),
                "valid": not problems,
                "name": pipeline.name if pipeline is not None else None,
                "steps": [step.name for step in pipeline.steps] if pipeline is not None else [],
                "problems": [asdict(problem) for problem in problems],
            }
        )
    else:
        for problem in problems:
            click.echo(problem_line(file, problem))
        if problems:
            note("1 problem" if len(problems) == 1 else f"{len(problems)} problems")
        elif pipeline is not None:
            count = "1 step" if len(pipeline.steps) == 1 else f"{len(pipeline.steps)} steps"
            note(f"{file}: pipeline {pipeline.name} is valid ({count})")
    return INVALID if problems else 0


def problem_line(file: Path, problem: Any) -> str:
    """A problem in the form that editors and CI systems make into links."""
    from outrider.cli._output import clean

    place = f"{file}:{problem.line}:{problem.column}" if problem.line else str(file)
    path = f"{problem.path}: " if problem.path else ""
    hint = f" ({problem.hint})" if problem.hint else ""
    return clean(f"{place}: {path}{problem.message}{hint}")


@command.command()
@click.option("--server", "source", flag_value="server", help="Of the server's nodes; an error if no server is known.")
@click.option("--local", "source", flag_value="local", help="Of the step plugins installed here, without a server.")
@click.option("--node", metavar="NODE", help="With the step types of this node alone.")
@click.option("--role", metavar="ROLE", help="With those of the nodes that have this role.")
@click.option(
    "--file", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file, whole or not at all."
)
@click.pass_obj
def schema(app: App, source: str | None, node: str | None, role: str | None, file: Path | None) -> None:
    """Print the JSON Schema (draft-07) of pipelines, with the parameters of step types.

    These are the step types that the nodes of the server have reported; where no context says which server, those of
    the step plugins installed here. Editors check and complete with it, by a first line in the pipeline:

    # yaml-language-server: $schema=./pipeline.schema.json
    """
    from outrider.errors import InvalidInput
    from outrider.schema import schema_text

    if node and role:
        raise click.UsageError("--node and --role can't be given together")
    if source == "local" and (node or role):
        raise click.UsageError("--local knows no nodes: leave out --node and --role")
    try:
        made = _local_schema() if source == "local" else _servers_schema(app, node or "", role or "")
    except InvalidInput as error:
        if error.code != "no_context" or source or node or role or app.context:
            raise
        note("no server is known, so this is with the step plugins installed here")
        made = _local_schema()
    text = schema_text(made)
    if file is None:
        click.echo(text)
        return
    write_whole(file, f"{text}\n")
    note(f"{file}: refer to it in a pipeline's first line: # yaml-language-server: $schema={file}")


def _local_schema() -> dict[str, Any]:
    from outrider.schema import installed_step_types, pipeline_schema

    step_types, broken = installed_step_types()
    for problem in broken:
        note(f"warning: {problem}")
    return pipeline_schema(step_types)


def _servers_schema(app: App, node: str, role: str) -> dict[str, Any]:
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        answer = client.call(client.stub.GetPipelineSchema, pb.GetPipelineSchemaRequest(node_id=node, role=role))
    if not answer.nodes:
        note("the server has no nodes yet, so this has no step types")
    return dict(json.loads(answer.schema_json))
