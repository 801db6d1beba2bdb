"""It has no step types; its hooks around the steps of others fail, each in a way of its own."""

import sys

from outrider.steps import hookimpl

outrider_contract = ">=1,<2"


@hookimpl
def outrider_before_step(step_type):
    raise RuntimeError(f"{step_type} does not please me")


@hookimpl
def outrider_after_step():
    sys.exit(5)


@hookimpl
def outrider_classify_failure(exit_code):
    return "temporary"


@hookimpl
def outrider_node_facts():
    return {"gpu": object()}
