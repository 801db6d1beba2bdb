"""`$(…)` in parameters is the author's; what an expression brings in stays what it is."""

from __future__ import annotations

from typing import Any

import pytest
from outrider_step_container._models import StartParams

from agent_core.container_spec import substitute
from outrider.expressions import render_params

SCHEMA = StartParams.model_json_schema()
PORTS = {"game": 27001}


def started_with(params: dict[str, Any], **args: Any) -> Any:
    """What the container gets: rendered by the agent, then replaced as the control socket does it."""
    made = render_params(params, SCHEMA, {"args": args})

    def done(value: Any) -> Any:
        if isinstance(value, str):
            return substitute(value, PORTS)
        return {k: done(v) for k, v in value.items()} if isinstance(value, dict) else [done(v) for v in value]

    return {key: done(value) for key, value in made.items()}


@pytest.mark.parametrize(
    "data",
    ["$(ports.game)", "$(evil)", "$$(ports.game)", "$$$(x)", "$(", "$", "$$", "(ports.game)", "a $(b(c)) $(", "$ (x)"],
)
@pytest.mark.parametrize("template", ["{}", "x{}y", "${}", "$${}", "{}(ports.game)", "{}ports.game)", "{}{}"])
def test_data_is_never_replaced(data: str, template: str) -> None:
    text = template.replace("{}", "${{ args.x }}")
    found = started_with({"env": {"A": text}, "args": [text], "entrypoint": [text]}, x=data)
    # A "$$(" that the author wrote is a literal "$(", and here the author wrote none.
    expected = template.replace("{}", data)
    assert found == {"env": {"A": expected}, "args": [expected], "entrypoint": [expected]}


def test_the_authors_own_are_replaced_beside_data() -> None:
    params = {"env": {"A": "$(ports.game) ${{ args.x }} $$(ports.game)"}}
    assert started_with(params, x="$(evil)") == {"env": {"A": "27001 $(evil) $(ports.game)"}}


def test_a_whole_list_or_mapping_of_data_is_not_replaced_either() -> None:
    params = {"env": "${{ args.env }}", "args": "${{ args.list }}"}
    found = started_with(params, env={"A": "$(ports.game)"}, list=["$(evil)", "x"])
    assert found == {"env": {"A": "$(ports.game)"}, "args": ["$(evil)", "x"]}


def test_other_parameters_are_left_alone() -> None:
    found = render_params({"name": "${{ args.x }}", "image": "a${{ args.x }}"}, SCHEMA, {"args": {"x": "$(date)"}})
    assert found == {"name": "$(date)", "image": "a$(date)"}
