"""The root command: finds subcommands without importing the others, and turns every error into a sentence."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from outrider.cli._tree import COMMANDS, help_text
from outrider.errors import InvalidInput, NotFound, OperationTimeout, OutriderError

if TYPE_CHECKING:
    from outrider.cli._client import Client
    from outrider.cli._context import Target

DONE, FAILED, USAGE, SOME_FAILED, INVALID, TIMED_OUT = range(6)
"""The exit codes."""

INTERRUPTED = 130
OURS = ("outrider", "agent_core", "server_core")


@dataclass(slots=True)
class App:
    """The options that every command shares; click hands it on as ``obj``."""

    context: str | None = None  # a name, or a file
    debug: bool = False

    def target(self) -> Target:
        """Where the server is, by the environment and the context file. Raises InvalidInput if nothing says so."""
        from outrider.cli._context import find_target

        return find_target(os.environ, self.context)

    def client(self) -> Client:
        """A connection to the server; a context manager. Raises Unavailable with the cause in one sentence."""
        from outrider.cli._client import Client

        return Client(self.target())


class Root(click.Group):
    """The `outrider` command; a subcommand's module is imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"outrider.cli.{cmd_name}").command
        return command

    def get_help(self, ctx: click.Context) -> str:
        return help_text().rstrip("\n")


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.option("--context", metavar="NAME|FILE", envvar="OUTRIDER_CONTEXT")
@click.option("--debug", is_flag=True, envvar="OUTRIDER_DEBUG")
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=lambda *a: _print_version(*a))
@click.pass_context
def root(ctx: click.Context, context: str | None, debug: bool) -> None:
    ctx.obj = App(context, debug)


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from outrider import __version__

        click.echo(f"outrider {__version__}")
        ctx.exit()


def run(arguments: Sequence[str]) -> int:
    """Run a command line; gives the exit code. Whatever goes wrong comes out as one sentence on stderr."""
    app_debug = "--debug" in arguments or bool(os.environ.get("OUTRIDER_DEBUG"))
    try:
        result: Any = root.main(args=list(arguments), prog_name="outrider", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else DONE
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)  # the help itself, as it is
        return USAGE
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "outrider"
        say_error(f"{error.format_message().rstrip('.')} (see `{where} --help`)")
        return USAGE
    except click.ClickException as error:
        say_error(error.format_message())
        return INVALID if isinstance(error, click.FileError) else FAILED
    except (click.Abort, KeyboardInterrupt):
        # Ctrl-C is how one leaves `logs -f` and `events -f`: there is nothing to explain.
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has read enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OutriderError as error:
        if app_debug:
            traceback.print_exc()
        print_error(error)
        return exit_code(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if app_debug or package in OURS:
            return _unexpected(error, app_debug)
        say_error(f"this command needs the package {package!r}, which is not installed (pip install 'outrider[all]')")
        return FAILED
    except Exception as error:
        return _unexpected(error, app_debug)


def exit_code(error: OutriderError) -> int:
    """The exit code for an error: what was given is wrong or does not exist, it timed out, or it failed."""
    if isinstance(error, InvalidInput | NotFound):
        return INVALID
    return TIMED_OUT if isinstance(error, OperationTimeout) else FAILED


def print_error(error: OutriderError) -> None:
    """Say an error on stderr: a sentence, then, if it carries several problems, one line for each."""
    problems = error.problems if isinstance(error, InvalidInput) else ()
    say_error(str(error))
    # A message that is made of its problems (the configuration's, say) is not followed by them again.
    for problem in problems:
        if str(problem) not in str(error):
            click.echo(f"  {problem}", err=True)


def say_error(sentence: str) -> None:
    """Say one sentence on stderr, marked as an error."""
    label = click.style("error:", fg="red", bold=True)
    click.echo(f"{label} {' '.join(sentence.splitlines())}", err=True)


def _unexpected(error: Exception, debug: bool) -> int:
    # Values of a traceback may be confidential: the file is its owner's alone (mkstemp makes it 0600).
    sentence = f"this is a defect of outrider: {type(error).__name__}: {error}"
    if debug:
        traceback.print_exc()
        say_error(sentence)
        return FAILED
    try:
        handle, name = tempfile.mkstemp(prefix="outrider-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    except OSError:
        say_error(f"{sentence} (run it again with --debug to see where)")
    else:
        say_error(f"{sentence} (what happened is in {name})")
    return FAILED
