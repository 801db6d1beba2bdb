"""`outrider completion`: click's own scripts."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(
    "completion",
    help="Print the script that completes commands in a shell. For bash: `source <(outrider completion bash)`.",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    kind = get_completion_class(shell)
    assert kind is not None, "click knows the three shells of the choice"
    click.echo(kind(ctx.find_root().command, {}, "outrider", "_OUTRIDER_COMPLETE").source())
