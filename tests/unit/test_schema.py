# ruff: noqa: E501 - what is said is tested to the letter
"""Pipelines against step types, wherever the schemas come from; and the schema for editors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, Field

from outrider._schema_errors import schema_problems
from outrider.errors import InvalidInput, Problem
from outrider.pipeline import Pipeline, load_pipeline
from outrider.schema import StepTypeSpec, check_params, check_steps, pipeline_schema
from outrider.steps import ReadPath, StepPlan, StepType, VolumeMounts, WritePath


class Tcp(BaseModel, extra="forbid"):
    kind: Literal["tcp"] = "tcp"
    port: int


class Http(BaseModel, extra="forbid"):
    kind: Literal["http"]
    port: int
    path: str = "/"


class Params(BaseModel, extra="forbid"):
    source: ReadPath
    target: WritePath | None = None
    count: int = Field(default=1, ge=1)
    mode: Literal["fast", "safe"] = "fast"
    volumes: VolumeMounts = {}
    tags: list[str] = []
    ready: Annotated[Tcp | Http, Field(discriminator="kind")] | None = None


class Outputs(BaseModel, extra="forbid"):
    path: str
    ports: dict[str, int] = {}


def spec(name: str = "ex.copy", **more: Any) -> StepTypeSpec:
    step_type = StepType(name=name, params=Params, outputs=Outputs, resolve=lambda p, c: StepPlan(image="x"), **more)
    return StepTypeSpec.of(step_type, distribution="outrider-step-ex", version="1.0", plugin="ex")


TYPES = {"ex.copy": spec(envs=["KEY"])}


def pipeline(params: str, extra: str = "") -> Pipeline:
    return load_pipeline(f"""\
name: x
args: {{n: {{type: integer}}}}
envs: [{{name: KEI, value: a}}]
volumes: {{build: {{}}, saves: {{}}, other: {{}}}}
steps:
- name: one
  uses: ex.copy
  volumes: {{build: /build, saves: "/saves:rw"}}
  with: {params}
{extra}""")


def found(params: str, extra: str = "") -> list[str]:
    return [f"{p.path}: {p.message} ({p.hint})" for p in check_steps(pipeline(params, extra), TYPES)]


def test_right_parameters_pass_also_where_they_are_expressions() -> None:
    assert (
        found("{source: /build/a, target: /saves/b, count: 2, tags: [a], volumes: {saves: '/data:rw', build: /b}}")
        == []
    )
    assert (
        found("{source: '${{ args.n }}', count: '${{ args.n }}', mode: '${{ args.n }}', tags: '${{ args.n }}'}") == []
    )
    assert found("{source: '/build/${{ args.n }}', ready: {kind: '${{ args.n }}', port: '${{ args.n }}'}}") == []
    assert found("{source: /build, ready: {kind: http, port: 1}}") == []


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("{}", "steps[0].with.source: is required (a text)"),
        ("{source: /build/a, cuont: 1}", "steps[0].with.cuont: unknown parameter (did you mean count?)"),
        ("{source: 3}", "steps[0].with.source: must be a text, not the number 3 (quote it to make it text)"),
        ("{source: build}", "steps[0].with.source: must be an absolute path, as in /data/file, not 'build' ()"),
        ("{source: /build/a, count: 0}", "steps[0].with.count: must be 1 at least, not the number 0 ()"),
        ("{source: /build/a, count: '2'}", "steps[0].with.count: must be a whole number, not '2' ()"),
        ("{source: /build/a, mode: slow}", "steps[0].with.mode: 'slow' is not known here (it is one of fast, safe)"),
        ("{source: /build/a, tags: [1]}", "steps[0].with.tags[0]: must be a text, not the number 1 (quote it to make it text)"),
        ("{source: /build/a, ready: {kind: http, port: 1, pth: /}}", "steps[0].with.ready.pth: unknown parameter (did you mean path?)"),
        ("{source: /build/a, ready: 4}", "steps[0].with.ready: must be a mapping, not the number 4 ()"),
        ("{source: /elsewhere}", "steps[0].with.source: /elsewhere is below no volume of this step (it has build at /build, saves at /saves)"),
        ("{source: /buildings/a}", "steps[0].with.source: /buildings/a is below no volume of this step (it has build at /build, saves at /saves)"),
        ("{source: /build/../etc}", "steps[0].with.source: '/build/../etc' leaves its directory with '..' (write the path without it)"),
        ("{source: /build/a, target: /build/b}", "steps[0].with.target: /build/b is written to, but the volume build is read-only here "
                                                 '(allot it for writing: build: "/build:rw")'),
        ("{source: /build/a, target: '/build/${{ args.n }}'}", "steps[0].with.target: /build/${{ args.n }} is written to, but the volume "
                                                               'build is read-only here (allot it for writing: build: "/build:rw")'),
        ("{source: /build/a, volumes: {saev: /d}}", "steps[0].with.volumes.saev: this step was not given the volume saev (did you mean saves?)"),
        ("{source: /build/a, volumes: {other: /d}}", "steps[0].with.volumes.other: this step was not given the volume other (it has build, saves)"),
        ("{source: /build/a, volumes: {build: '/d:rw'}}", "steps[0].with.volumes.build: the volume build is handed on rw, but this step has it "
                                                          'read-only (allot it for writing: build: "/build:rw")'),
        ("{source: /build/a, volumes: {build: '/d:x'}}", "steps[0].with.volumes.build: the mode 'x' is not known (a mount reads like /data:rw)"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_said_in_words(params: str, expected: str) -> None:
    assert found(params) == [expected]


def test_all_wrong_parameters_are_listed_with_their_places() -> None:
    text = "\n    surce: /build/a\n    count: 0\n    tags: [1]\n    target: /build/x\n"
    problems = check_steps(pipeline(text), TYPES)
    assert [(p.line, p.path.rpartition("with.")[2]) for p in problems] == [
        (10, "source"),
        (10, "surce"),
        (11, "count"),
        (12, "tags[0]"),
        (13, "target"),
    ]


def test_an_unknown_step_type_names_the_distribution_that_has_it() -> None:
    extra = "- {name: two, uses: s3.download}\n- {name: three, uses: ex.cpy}\n- {name: four, uses: what.ever}\n"
    problems = check_steps(pipeline("{source: /build/a}", extra), TYPES, where="node n7")
    assert [str(p) for p in problems] == [
        "line 10: steps[1].uses: node n7 has no step type s3.download (it comes from outrider-step-s3, which is to be installed there)",
        "line 11: steps[2].uses: node n7 has no step type ex.cpy (did you mean ex.copy?)",
        "line 12: steps[3].uses: node n7 has no step type what.ever (there are ex.copy)",
    ]


def test_an_env_that_the_step_type_does_not_understand_is_said() -> None:
    text = pipeline("{source: /build/a}", "  envs: [KEI]\n")
    assert [p.hint for p in check_steps(text, TYPES)] == ["did you mean KEY?"]
    for any_env in ([], ["*"], ["*", "KEY"]):
        assert check_steps(text, {"ex.copy": spec(envs=any_env)}) == []


def test_outputs_that_a_step_type_has_not_are_said() -> None:
    second = "- {{name: two, uses: ex.copy, volumes: {{build: /build}}, with: {{source: /build/a, tags: ['${{{{ {} }}}}']}}}}\n"
    assert found("{source: /build/a}", second.format("steps.one.outputs.path")) == []
    assert found("{source: /build/a}", second.format("steps.one.outputs.ports.http")) == []
    assert found("{source: /build/a}", second.format("steps.one.outputs.pth")) == [
        "steps[1].with.tags[0]: steps.one.outputs has no pth (did you mean path?)"
    ]
    writeback = "writeback: [{attribute: a, value: 1, if: steps.one.outputs.nope == 1}]\n"
    assert found("{source: /build/a}", writeback) == [
        "writeback[0].if: steps.one.outputs has no nope (there are path, ports)"
    ]


def test_the_node_checks_again_with_real_values() -> None:
    step = pipeline("{source: '${{ args.n }}', target: '/saves/${{ args.n }}'}").steps[0]
    assert check_params(step, {"source": "/build/a", "target": "/saves/b"}, TYPES["ex.copy"]) == []
    escaped = check_params(step, {"source": "/etc/passwd", "target": "/saves/../build/x"}, TYPES["ex.copy"])
    assert [p.path for p in escaped] == ["with.source", "with.target"]


def test_data_that_looks_like_an_expression_is_checked_like_any_other_on_the_node() -> None:
    step = pipeline("{source: /build/a}").steps[0]
    params = {
        "source": "/build/../etc/${{ x }}",
        "target": "/build/${{ x }}",
        "count": "${{ x }}",
        "mode": "${{ x }}",
        "volumes": {"build": "/d:${{ x }}"},
    }
    problems = check_params(step, params, TYPES["ex.copy"])
    assert {p.path for p in problems} == {"with.source", "with.target", "with.count", "with.mode", "with.volumes.build"}
    assert check_params(step, {"source": "/build/${{ a file of this name }}"}, TYPES["ex.copy"]) == []


def test_a_broken_schema_is_the_plugin_s_fault_not_the_user_s() -> None:
    for schema in (
        {"type": 7},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#/$defs/missing"},
        {"properties": 3},
    ):
        broken = StepTypeSpec(name="ex.copy", params_schema=schema)
        problems = check_steps(pipeline("{source: /build/a}"), {"ex.copy": broken})
        assert len(problems) == 1
        assert "its schema is broken" in problems[0].message


@pytest.mark.parametrize("params", ["{}", "{key: a, prefix: b}", "{key: '${{ args.n }}', prefix: b}"])
def test_alternatives_of_parameters_are_said_as_such(params: str) -> None:
    schema = {"type": "object", "oneOf": [{"required": ["key"]}, {"required": ["prefix"]}]}
    types = {"ex.copy": StepTypeSpec(name="ex.copy", params_schema=schema)}
    assert [p.message for p in check_steps(pipeline(params), types)] == ["give exactly one of key, prefix"]
    assert check_steps(pipeline("{key: '${{ args.n }}'}"), types) == []


VALID = """
name: p
args: {n: {type: integer, default: 3}, plain: }
envs: [{set: s}, {name: REGION, value: eu}]
volumes: {build: , saves: {keep: true, scope: node, size: 1.5GiB}}
steps:
- name: one
  uses: ex.copy
  volumes: {build: /build, saves: "/saves:rw"}
  with: {source: /build/a, count: "${{ args.n }}", ready: {kind: http, port: "${{ args.n }}"}, tags: ["${{ args.n }}"]}
  envs: [KEY]
  if: true
  timeout: 1h30m
  retry: {max: 3, first_wait: 1s}
  resources: {memory: 1GiB, cpus: 0.5, pids: 10}
  needs: []
- {name: two, uses: not.installed, with: {anything: 1}, envs: {A: s.B}, if: always()}
writeback: [{attribute: a.b, value: {c: "${{ steps.one.outcome }}"}, if: "true"}]
"""


def errors(text: str) -> list[str]:
    schema = pipeline_schema(TYPES)
    jsonschema.Draft7Validator.check_schema(schema)
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(yaml.safe_load(text))]


def test_the_editor_schema_takes_what_the_loader_takes() -> None:
    load_pipeline(VALID)
    assert errors(VALID) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: p", "nmae: p"),
        ("type: integer", "type: int"),
        ("{set: s}", "{set: s, name: A}"),
        ("1.5GiB", "1.5 gigs"),
        ("scope: node", "scope: cluster"),
        ("timeout: 1h30m", "timeout: 90"),
        ("uses: ex.copy", "uses: copy"),
        ("/saves:rw", "/saves:wr"),
        ("first_wait", "firstwait"),
        ("attribute: a.b, ", ""),
        ("source: /build/a, ", ""),
        ("source: /build/a", "source: build/a"),
        ("kind: http", "kind: htp"),
        ("count: ", "cuont: "),
    ],
)
def test_the_editor_schema_refuses_what_is_wrong(old: str, new: str) -> None:
    text = VALID.replace(old, new, 1)
    assert text != VALID
    assert errors(text)
    refused: list[Problem] = []
    try:
        refused = check_steps(load_pipeline(text), TYPES)
    except InvalidInput as error:
        refused = list(error.problems)
    assert [p for p in refused if "not.installed" not in p.message]


def outrider(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outrider.cli", "pipeline", *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        check=False,
    )


def test_validate_prints_a_line_for_each_problem_and_exits_4(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "name: p\nsteps:\n- name: one\n  uses: e.x\n  tiemout: 1s\n  with: {a: '${{ args.b }}'}\n"
    )
    result = outrider("validate", "--syntax-only", "bad.yaml", cwd=tmp_path)
    assert result.returncode == 4
    assert result.stdout.splitlines() == [
        "bad.yaml:5:3: steps[0].tiemout: unknown key (did you mean timeout?)",
        "bad.yaml:6:13: steps[0].with.a: the pipeline has no argument b (add `args: {b: {type: string}}`)",
    ]
    assert result.stderr == "2 problems\n"
    as_json = yaml.safe_load(outrider("validate", "--syntax-only", "-o", "json", "bad.yaml", cwd=tmp_path).stdout)
    assert (as_json["valid"], as_json["problems"][0]["line"], as_json["problems"][0]["column"]) == (False, 5, 3)


def test_validate_says_when_all_is_well(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("name: p\nsteps:\n- {name: one, uses: nobody.has_it}\n")
    result = outrider("validate", "--syntax-only", "good.yaml", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "good.yaml: pipeline p is valid (1 step)\n")
    result = outrider("validate", "good.yaml", cwd=tmp_path)
    assert result.returncode == 4
    assert "this machine has no step type nobody.has_it" in result.stdout


def test_a_missing_and_a_huge_file_are_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(100 * 1024**2)
    for name, said in (("none.yaml", "there is no file none.yaml"), ("huge.yaml", "huge.yaml is larger than 1 MiB")):
        result = outrider("validate", name, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (4, "")
        assert said in result.stderr


def test_schema_prints_the_schema(tmp_path: Path) -> None:
    result = outrider("schema", cwd=tmp_path)
    assert result.returncode == 0
    jsonschema.Draft7Validator.check_schema(yaml.safe_load(result.stdout))


def test_schema_says_in_its_own_words_what_a_pattern_can_not() -> None:
    schema = {
        "properties": {
            "sum": {
                "type": "string",
                "pattern": "^[0-9a-f]{64}$",
                "x-outrider-message": "must be a digest, not {value}",
            }
        },
        "oneOf": [{"required": ["key"]}, {"required": ["prefix"]}],
        "x-outrider-message": "give either 'key' or 'prefix'",
    }
    both = {"key": "k", "prefix": "p", "sum": "abc"}
    assert {str(problem) for problem in schema_problems(schema, both, "with", "x")} == {
        "with: give either 'key' or 'prefix'",
        "with.sum: must be a digest, not 'abc'",
    }
    assert schema_problems(schema, {"key": "k", "sum": "0" * 64}, "with", "x") == []
