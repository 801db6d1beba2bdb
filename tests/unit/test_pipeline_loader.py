"""The strict loader: what a pipeline says, and what is said of one that is wrong."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import InvalidInput, Problem
from outrider.pipeline import (
    ancestors,
    args_from_text,
    env_references,
    graph,
    load_pipeline,
    plain_envs,
    resolve_args,
    writeback_needs,
)

ARENA = """\
name: deploy-arena
args:
  version: {type: string}
  slots:   {type: integer, default: 16, from: max_players}
  note:    {type: string, required: false}
envs:
  - set: builds-s3
  - {name: REGION, value: eu-1}
volumes:
  build:
  saves: {keep: true, scope: object, size: 5GiB}
steps:
  - name: fetch
    uses: s3.download
    with: {key: "arena/${{ args.version }}.7z", to: /build/arena.7z}
    volumes: {build: "/build:rw"}
    envs: {S3_ENDPOINT: builds-s3.ENDPOINT, AWS_REGION: REGION, S3_KEY: KEY}
    timeout: 1h30m
    retry: {max: 5, first_wait: 500ms}
    resources: {memory: 512MiB, cpus: 0.5, pids: 100}
  - name: unpack
    uses: archive.extract
    with: {from: /build/arena.7z, to: /saves/arena}
    volumes: {build: /build, saves: "/saves:rw"}
  - name: start
    uses: container.start
    if: args.slots > 0
    with: {image: "game:${{ args.version }}", ports: [{name: game, container: 27960}]}
writeback:
  - {attribute: port, value: "${{ steps.start.outputs.port }}", if: "${{ steps.start.outcome == 'succeeded' }}"}
  - {attribute: data_dir, value: "${{ volumes.saves.host_path }}"}
"""


def problems(text: str | bytes) -> list[Problem]:
    with pytest.raises(InvalidInput) as caught:
        load_pipeline(text)
    assert caught.value.problems
    return list(caught.value.problems)


def one_step(extra: str = "", head: str = "") -> str:
    return f"name: p\n{head}steps:\n- name: one\n  uses: ex.copy\n{extra}"


def test_a_whole_pipeline_means_what_it_says() -> None:
    pipeline = load_pipeline(ARENA)
    fetch, unpack, start = pipeline.steps
    assert pipeline.name == "deploy-arena"
    assert (fetch.timeout_s, fetch.retry.max, fetch.retry.first_wait_s) == (5400.0, 5, 0.5)
    assert (fetch.resources.memory_bytes, fetch.resources.cpus, fetch.resources.pids) == (512 * 1024**2, 0.5, 100)
    assert (fetch.volumes["build"].path, fetch.volumes["build"].writable) == ("/build", True)
    assert not unpack.volumes["build"].writable
    assert start.if_ == "args.slots > 0"
    assert start.with_["ports"] == [{"name": "game", "container": 27960}]
    assert pipeline.volumes["build"].scope == "run"
    assert (pipeline.volumes["saves"].scope, pipeline.volumes["saves"].keep) == ("object", True)
    assert pipeline.volumes["saves"].size_bytes == 5 * 1024**3
    assert load_pipeline(ARENA.encode()) == pipeline


def test_steps_run_in_order_and_needs_make_a_graph() -> None:
    assert graph(load_pipeline(ARENA)) == {"fetch": (), "unpack": ("fetch",), "start": ("unpack",)}
    text = (
        "name: p\nsteps:\n- {name: a, uses: e.x}\n- {name: b, uses: e.x, needs: []}\n"
        "- {name: c, uses: e.x, needs: [a, b]}\n- {name: d, uses: e.x}"
    )
    pipeline = load_pipeline(text)
    assert graph(pipeline) == {"a": (), "b": (), "c": ("a", "b"), "d": ("c",)}
    assert ancestors(pipeline)["d"] == {"a", "b", "c"}
    assert ancestors(pipeline)["b"] == frozenset()


def test_envs_get_their_full_names() -> None:
    pipeline = load_pipeline(ARENA)
    assert pipeline.step("fetch").envs == {
        "S3_ENDPOINT": "builds-s3.ENDPOINT",
        "AWS_REGION": "REGION",
        "S3_KEY": "builds-s3.KEY",
    }
    assert env_references(pipeline) == ["REGION", "builds-s3.ENDPOINT", "builds-s3.KEY"]
    assert plain_envs(pipeline) == {"REGION": "eu-1"}
    listed = load_pipeline(one_step("  envs: [KEY, s.OTHER]\n", "envs: [{set: s}]\n"))
    assert listed.step("one").envs == {"KEY": "s.KEY", "OTHER": "s.OTHER"}


def test_writebacks_wait_for_the_steps_they_refer_to() -> None:
    assert writeback_needs(load_pipeline(ARENA)) == (frozenset({"start"}), frozenset())
    text = one_step("- {name: two, uses: e.x}\nwriteback:\n- {attribute: a, value: 1, if: success()}\n")
    assert writeback_needs(load_pipeline(text)) == (frozenset({"one", "two"}),)


def test_all_problems_are_said_at_once_with_place_and_hint() -> None:
    text = ARENA.replace("timeout: 1h30m", "tiemout: 1h30m").replace("builds-s3.ENDPOINT", "build-s3.ENDPOINT")
    text = text.replace("args.version", "args.versoin", 1).replace("5GiB", "5 Gigs").replace("outcome ==", "result ==")
    found = {(p.line, p.path, p.hint) for p in problems(text)}
    assert found == {
        (11, "volumes.saves.size", "a size reads like 512MiB or 5GiB"),
        (15, "steps[0].with.key", "did you mean version?"),
        (17, "steps[0].envs.S3_ENDPOINT", "did you mean builds-s3?"),
        (18, "steps[0].tiemout", "did you mean timeout?"),
        (30, "writeback[0].if", "it has outputs and outcome"),
    }
    assert [p.line for p in problems(text)] == sorted(p.line for p in problems(text))
    assert all(p.column > 1 for p in problems(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the document is empty"),
        ("# nothing\n", "the document is empty"),
        ("- a\n", "must be a mapping, not a list"),
        ("hello", "must be a mapping, not the text 'hello'"),
        ("name: p\nsteps: [", "not valid YAML"),
        ("name: p\nname: q\nsteps: []", "the key 'name' stands twice"),
        ("name: p\nsteps: []", "has no step"),
        ("name: P\nsteps: []", "'P' is not a name"),
        ("name: 1\nsteps: []", "must be a text, not the number 1"),
        ("steps: [{name: a, uses: e.x}]", "is missing"),
        ("name: p\nsteps: [{name: a}]", "is missing"),
        ("name: p\n---\nname: q\n", "a second document begins here"),
        (one_step("  <<: {timeout: 1s}\n"), "merge key"),
        (one_step("  with: !!python/object/apply:os.system [ls]\n"), "is not allowed"),
        (one_step("  with: {? [a] : b}\n"), "a key must be plain text"),
        (one_step("  with: {a: 99999999999999999999}\n"), "does not fit 64 bits"),
        (one_step("  with: [a]\n"), "must be a mapping, not a list"),
        (one_step("  timeout: 10\n"), "must be a duration with its unit"),
        (one_step("  timeout: 10 parsecs\n"), "is not a duration"),
        (one_step("  retry: {max: -1}\n"), "from 0 to 100"),
        (one_step("  retry: {max: true}\n"), "must be a whole number"),
        (one_step("  resources: {memory: 1MiB}\n"), "6MiB at least"),
        (one_step("  uses: {}\n"), "stands twice"),
        (one_step("- {name: one, uses: e.x}\n"), "is called one too"),
        (one_step("  volumes: {data: /data}\n"), "the pipeline has no volume data"),
        (one_step("  volumes: {d: data}\n", "volumes: {d: {}}\n"), "is not an absolute path"),
        (one_step("  volumes: {d: /a/../b}\n", "volumes: {d: {}}\n"), "is not a plain path"),
        (one_step("  volumes: {d: /outrider/x}\n", "volumes: {d: {}}\n"), "is the core's"),
        (one_step("  volumes: {d: '/a:wr'}\n", "volumes: {d: {}}\n"), "the mode 'wr' is not known"),
        (one_step("  volumes: {d: /a, e: /a}\n", "volumes: {d: {}, e: {}}\n"), "is where d is mounted"),
        (one_step("  volumes: {d: /a/b/c, e: /a}\n", "volumes: {d: {}, e: {}}\n"), "/a/b/c is inside of /a, where e"),
        (one_step("", "volumes: {d: {keep: true}}\n"), "lives as long as the run"),
        (one_step("  envs: [KEY]\n"), "the pipeline has no env KEY"),
        (one_step("  envs: [KEY]\n", "envs: [{set: a}, {set: b}]\n"), "can be in any of the sets a, b"),
        (one_step("  envs: [OUTRIDER_X]\n", "envs: [{set: a}]\n"), "are the core's"),
        (one_step("", "envs: [{set: a, name: b}]\n"), "must be `set: NAME`"),
        (one_step("", "envs: [{name: B, value: 8080}]\n"), "must be a text, not the number 8080"),
        (one_step("  needs: [two]\n"), "there is no step two"),
        (one_step("  needs: [one]\n"), "can't need itself"),
        (one_step("  needs: [b]\n- {name: b, uses: e.x}\n"), "wait for one another in a circle"),
        (one_step("  uses2: x\n"), "unknown key"),
        (one_step("", "args: {a: {type: int}}\n"), "'int' is not known here"),
        (one_step("", "args: {a: {type: integer, default: '1'}}\n"), "must be a whole number"),
        (one_step("", "args: {a: {default: 1.10}}\n"), "must be a text, not 1.1"),
        (one_step("", "args: {a-b: {}}\n"), "is not a name"),
        (one_step("  name2: '${{ args.x }}'\n"), "unknown key"),
        (one_step("  timeout: '${{ args.x }}'\n"), "is not a duration"),
        (one_step("  volumes: {d: '/${{ args.x }}'}\n", "volumes: {d: {}}\n"), "an expression can't stand here"),
        (one_step("  with: {'${{ args.x }}': 1}\n"), "an expression can't be a key"),
        (one_step("  with: {a: '${{ args.x'}\n"), "has no `}}`"),
        (one_step("  with: {a: '${{ 1 + }}'}\n"), "is not valid CEL"),
        (one_step("  with: {a: '${{ always() }}'}\n"), "has a meaning in `if:` alone"),
        (one_step("  with: {a: '${{ steps.one.outputs.x }}'}\n"), "refers to itself"),
        (one_step("  with: {a: '${{ steps.b.outcome }}'}\n- {name: b, uses: e.x}\n"), "is not sure to be over"),
        (one_step("  with: {a: '${{ volumes.v.host_path }}'}\n"), "the pipeline has no volume v"),
        (one_step("  with: {a: '${{ object.port }}'}\n"), "an object has no port"),
        (one_step("  if: '${{ true }} and more'\n"), "a condition is one expression"),
        (one_step("writeback: [{attribute: a}]\n"), "is missing"),
    ],
)
def test_what_is_wrong_is_said_in_one_clear_sentence(text: str, said: str) -> None:
    found = problems(text)
    assert any(said in str(problem) for problem in found), [str(problem) for problem in found]
    assert all(problem.line for problem in found)


def test_a_dash_in_a_step_name_is_explained() -> None:
    text = (
        "name: p\nsteps:\n- {name: get-it, uses: e.x}\n- {name: b, uses: e.x, with: {a: '${{ steps.get-it.outcome }}'}}"
    )
    assert 'steps["get-it"]' in str(problems(text)[0])
    load_pipeline(text.replace("steps.get-it.", 'steps["get-it"].'))


def test_values_are_what_they_look_like() -> None:
    values = "a: on, b: 1:30, c: 2024-01-01, d: 010, e: 0x1f, f: 1.5, g: true, h: ~, i: 'true', j: 1e3, k: .inf"
    assert load_pipeline(one_step(f"  with: {{{values}}}\n")).step("one").with_ == {
        "a": "on", "b": "1:30", "c": "2024-01-01", "d": "010", "e": 31, "f": 1.5, "g": True, "h": None, "i": "true",
        "j": 1000.0, "k": ".inf",
    }  # fmt: skip


def test_an_alias_stands_for_a_value_of_its_own() -> None:
    step = load_pipeline(one_step("  with: {a: &x {k: [1]}, b: *x}\n")).step("one")
    assert step.with_ == {"a": {"k": [1]}, "b": {"k": [1]}}
    assert step.with_["a"] is not step.with_["b"]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP_ALIASES = "a0: &a0 " + "[" * 50 + "1" + "]" * 50 + "\n"
DEEP_ALIASES += "".join(f"a{n}: &a{n} " + "[" * 50 + f"*a{n - 1}" + "]" * 50 + "\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "its aliases multiply"),
        (DEEP_ALIASES, "nested deeper than 64"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 10_000, "nested deeper than 64"),
        ("{a: " * 10_000, "nested deeper than 64"),
        ("\n".join(" " * n + "a:" for n in range(1400)), "nested deeper than 64"),
        ("- a\n" * 250_000, "more than 20,000 values"),
        ("x" * (1024 * 1024 + 1), "1 MiB at most"),
        (b"\xff" * 100, "not UTF-8"),
        ("name: a\0", "not valid YAML"),
        (one_step("  with: {a: '${{ " + "(" * 1000 + "'}"), "has no `}}`"),
        (one_step("  with: {a: '${{ " + "(" * 150 + "1" + ")" * 150 + " }}'}"), "deeper than 32"),
        (one_step("  with: {a: '${{ " + "1+" * 400_000 + "1 }}'}"), "over 2048 characters"),
        (one_step("  with: {a: '" + "${{1}}" * 150_000 + "'}"), "over 64 expressions"),
        (one_step("  with: {a: '${{ \"" + "a" * 900_000 + "'}"), "over 2048 characters"),
        (one_step("  with:\n" + "".join(f"    k{n}: ${{{{ {'1+' * 190}{n} }}}}\n" for n in range(2000))), "too long"),
        ("name: p\nsteps:\n" + "- {name: a, uses: e.x}\n" * 3000, "200 are the most"),
        (one_step("  needs: [" + "b," * 15_000 + "]\n"), "more than 100 problems"),
    ],
)  # fmt: skip
def test_hostile_text_is_refused_within_a_second(text: str | bytes, said: str) -> None:
    load_pipeline(one_step("  with: {a: '${{ 1 }}'}\n"))  # imports and the CEL library don't count
    start = time.process_time()
    found = problems(text)
    assert time.process_time() - start < 1
    assert any(said in str(problem) for problem in found), str(found[0])[:300]
    assert len(found) <= 101


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=400) | st.binary(max_size=400))
def test_no_text_makes_the_loader_fail_otherwise(text: str | bytes) -> None:
    with pytest.raises(InvalidInput):
        load_pipeline(text)


SCRAPS = [
    *("name: p\n", "steps:\n", "- name: a\n", "  uses: e.x\n", "  with: ", "{a: ", "'${{ ", "args.", "}}'", "}", "\n"),
    *("  needs: [a]\n", "args: {a: {type: integer}}\n", "&x ", "*x", "writeback:\n", "- {attribute: b, value: 1}\n"),
    *("  if: ", "steps.a.outputs", "volumes: {v: {}}\n", "  envs: [A]\n", "  volumes: {v: /v}\n", "? ", "<<: "),
    *("!!str ", "null", "1e999", "\t", "---\n", '"'),
]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(SCRAPS), max_size=25).map("".join))
def test_near_pipelines_load_or_are_refused_with_places(text: str) -> None:
    try:
        pipeline = load_pipeline(text)
    except InvalidInput as error:
        refused = error
    else:
        assert set(graph(pipeline)) == {step.name for step in pipeline.steps}
        return
    assert refused.problems
    assert all(0 <= problem.line <= text.count("\n") + 2 for problem in refused.problems)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), max_size=3, unique=True), min_size=1, max_size=8))
def test_a_graph_loads_exactly_if_it_has_no_cycle(needs: list[list[int]]) -> None:
    count = len(needs)
    wanted = [[n for n in of if n < count and n != index] for index, of in enumerate(needs)]
    text = "name: p\nsteps:\n" + "".join(
        f"- {{name: s{index}, uses: e.x, needs: [{', '.join(f's{n}' for n in of)}]}}\n"
        for index, of in enumerate(wanted)
    )
    done: set[int] = set()
    while ready := [n for n in range(count) if n not in done and set(wanted[n]) <= done]:
        done.update(ready)
    if len(done) == count:
        pipeline = load_pipeline(text)
        assert all(step not in before for step, before in ancestors(pipeline).items())
    else:
        assert any("circle" in str(problem) for problem in problems(text))


ARGS = load_pipeline(ARENA)


def test_args_come_from_the_caller_then_the_object_then_the_default() -> None:
    assert resolve_args(ARGS, {"version": "1"}) == {"version": "1", "slots": 16}
    assert resolve_args(ARGS, {"version": "1"}, {"max_players": 8, "slots": 9}) == {"version": "1", "slots": 8}
    assert resolve_args(ARGS, {"slots": 3}, {"version": "2", "max_players": 8, "x": 1}) == {"version": "2", "slots": 3}


def test_args_are_frozen_when_they_are_resolved() -> None:
    pipeline = load_pipeline(one_step("", "args: {a: {type: list}}\n"))
    given_list = [1]
    resolved = resolve_args(pipeline, {"a": given_list})
    given_list.append(2)
    assert resolved == {"a": [1]}


def test_every_wrong_arg_is_said() -> None:
    with pytest.raises(InvalidInput) as caught:
        resolve_args(ARGS, {"slot": 1, "slots": "16"}, {})
    said = [str(problem) for problem in caught.value.problems]
    assert said == [
        "args.slot: pipeline deploy-arena has no such argument (did you mean slots?)",
        "args.version: is required and was not given (give it, or set the attribute version of the run's object)",
        'args.slots: must be a whole number, not "16" (for example 16)',
    ]
    with pytest.raises(InvalidInput, match="taken from the object's attribute max_players"):
        resolve_args(ARGS, {"version": "1"}, {"max_players": True})
    with pytest.raises(InvalidInput, match="more than 65,536"):
        resolve_args(ARGS, {"version": "x" * 70_000})


def test_args_of_the_command_line_take_their_declared_types() -> None:
    head = (
        "args: {s: {}, i: {type: integer}, n: {type: number}, b: {type: boolean}, l: {type: list}, o: {type: object}}\n"
    )
    pipeline = load_pipeline(one_step("", head))
    pairs = {"s": "1", "i": "1", "n": "1", "b": "true", "l": "[1]", "o": '{"a": 1}'}
    assert args_from_text(pipeline, pairs) == {"s": "1", "i": 1, "n": 1, "b": True, "l": [1], "o": {"a": 1}}
    with pytest.raises(InvalidInput) as caught:
        args_from_text(pipeline, {"i": "x", "b": "1", "unknown": "1"})
    assert [problem.path for problem in caught.value.problems] == ["args.unknown", "args.i", "args.b"]
