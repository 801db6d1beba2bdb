"""What a pipeline says is what happens: order, conditions, values, volumes, envs, failures, through the real parts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.e2e.conftest import OUTRIDER, Dev
from tests.e2e.pipelines import BASE, pipeline, python, states_of, steps_of

FAILED, INVALID, TIMED_OUT = 1, 4, 5


def logs(dev: Dev, run: dict[str, Any] | str, *args: str) -> str:
    """The log of a run, or of one of its steps."""
    run_id = run if isinstance(run, str) else run["run_id"]
    return dev.ok("logs", "run", run_id, *args)


def run_to_end(dev: Dev, text: str, *args: object, code: int = 0) -> dict[str, Any]:
    """Execute a pipeline that ends with this exit code."""
    done = dev.outrider("run", dev.pipeline(text), "-o", "json", *args)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}\n{dev.log()}"
    run: dict[str, Any] = json.loads(done.stdout)
    return run


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_independent_steps_run_side_by_side_and_outputs_reach_later_steps_with_their_types(dev: Dev) -> None:
    # left and right wait for one another: one after the other, neither would end.
    meet = """
        open(f"/area/{sys.argv[1]}", "w").close()
        wait_for(f"/area/{sys.argv[2]}")
        out(number=int(sys.argv[3]), items=["a", {"b": None}], text="$" + "{{ args.command }}", half=0.5)
    """
    work = {"work": "/area:rw"}
    text = pipeline(
        python("left", meet, "left", "right", "20", needs=[], volumes=work),
        python("right", meet, "right", "left", "22", needs=[], volumes=work),
        python(
            "join",
            """
            inputs = json.load(open("/outrider/inputs.json"))
            out(pids=inputs["resources"]["pids"], argv=sys.argv[1:])
            """,
            "number ${{ steps.left.outputs.number + steps.right.outputs.number }}",
            "${{ string(steps.left.outputs.half) }}",
            "items ${{ steps.left.outputs.items }}",
            "${{ steps.right.outputs.text }}",
            with_={"resources": {"pids": "${{ steps.left.outputs.number + steps.right.outputs.number }}"}},
            needs=["left", "right"],
        ),
        {
            "name": "whole",
            "uses": "container.run",
            "needs": ["join"],
            "with": {"image": BASE, "args": "${{ args.command }}"},
        },
        args={"command": {"type": "list"}},
        volumes={"work": {}},
        writeback=[
            {"attribute": "number", "value": "${{ steps.left.outputs.number }}"},
            {"attribute": "items", "value": "${{ steps.left.outputs.items }}"},
            {"attribute": "half", "value": "${{ steps.left.outputs.half }}"},
            {"attribute": "said", "value": "number ${{ steps.left.outputs.number }}"},
        ],
    )
    dev.ok("object", "set", "test/types", "command=" + json.dumps(["echo", "two  words", "${{ args }}"]))
    run = run_to_end(dev, text, "--object", "test/types")
    steps = steps_of(run)
    assert {name: set(step["needs"]) for name, step in steps.items()} == {
        "left": set(), "right": set(), "join": {"left", "right"}, "whole": {"join"},
    }  # fmt: skip
    assert steps["join"]["outputs"]["pids"] == 42
    # What an expression came to is data: nothing in it is evaluated again.
    assert steps["join"]["outputs"]["argv"] == ["number 42", "0.5", 'items ["a", {"b": null}]', "${{ args.command }}"]
    assert logs(dev, run, "whole") == "two  words ${{ args }}\n"
    assert run["writeback"] == {"number": 20, "items": ["a", {"b": None}], "half": 0.5, "said": "number 20"}
    assert dev.json("object", "get", "test/types")["status"] == run["writeback"]


def test_conditions_decide_which_steps_run_and_what_is_written_back(dev: Dev) -> None:
    text = pipeline(
        python("early", "out(port=1)"),
        python("work", "print('before'); sys.exit(3 if sys.argv[1] == 'true' else 0)", "${{ string(args.broken) }}"),
        python("verify", "out(ok=True)", when="args.verify"),
        python("after", ""),
        python("clean-up", "print('cleaned')", when="failure()"),
        python(
            "tell",
            "print(*sys.argv[1:])",
            "${{ steps.work.outcome }}",
            "${{ has(steps.verify.outputs) ? 'verified' : 'unverified' }}",
            '${{ steps["clean-up"].outcome }}',
            when="${{ always() }}",
        ),
        args={"broken": {"type": "boolean", "default": False}, "verify": {"type": "boolean", "default": True}},
        writeback=[
            {"attribute": "port", "value": "${{ steps.early.outputs.port }}"},
            {"attribute": "good", "value": "yes", "if": "success()"},
            {"attribute": "bad", "value": "${{ steps.work.outcome }}", "if": "failure()"},
            {"attribute": "verified", "value": "${{ steps.verify.outputs.ok }}"},
        ],
    )
    dev.ok("object", "set", "test/conditions", "note=x")
    run = run_to_end(dev, text, "--object", "test/conditions", "--arg", "verify=false")
    assert states_of(run) == {
        "early": "succeeded", "work": "succeeded", "verify": "skipped",
        "after": "succeeded", "clean-up": "skipped", "tell": "succeeded",
    }  # fmt: skip
    assert logs(dev, run, "tell") == "succeeded unverified skipped\n"
    assert run["writeback"] == {"port": 1, "good": "yes"}

    run = run_to_end(dev, text, "--object", "test/conditions", "--arg", "broken=true", code=FAILED)
    assert run["state"] == "failed"
    assert states_of(run) == {
        "early": "succeeded", "work": "failed", "verify": "skipped",
        "after": "skipped", "clean-up": "succeeded", "tell": "succeeded",
    }  # fmt: skip
    assert steps_of(run)["after"]["reason"] == "step work failed"
    assert run["writeback"] == {"port": 1, "bad": "failed"}
    rows = dev.ok("object", "get", "test/conditions").partition("STATUS")[2].splitlines()[1:]
    written = {row.split()[0]: row.split()[1:3] for row in rows}
    assert set(written) == {"port", "good", "bad"}
    assert written["bad"][1] == run["run_id"] != written["good"][1]
    # Of several steps, each line says which step wrote it.
    shown = logs(dev, run).splitlines()
    assert [line.split()[0] for line in shown] == ["work", "clean-up", "tell"]
    assert shown[-1].endswith("failed unverified succeeded")


def test_arguments_come_from_the_caller_the_objects_attributes_or_their_defaults(dev: Dev) -> None:
    text = pipeline(
        python("show", "print(sys.argv[1].removeprefix('args '))", "args ${{ args }}"),
        args={
            "version": {"type": "string"},
            "slots": {"type": "integer", "default": 16, "from": "max_players"},
            "rate": {"type": "number", "default": 1.5},
            "maps": {"type": "list", "default": ["dm1"]},
            "extra": {"type": "object", "required": False},
        },
    )
    dev.ok("object", "set", "test/args", 'version="1.10"', "max_players=24", "rate=2.5")
    run = run_to_end(dev, text, "--object", "test/args", "--arg", "rate=3", "--arg", 'maps=["ctf1", "ctf2"]')
    expected = {"version": "1.10", "slots": 24, "rate": 3, "maps": ["ctf1", "ctf2"]}
    assert json.loads(logs(dev, run)) == expected
    assert run["args"] == expected
    assert run["object_version"] == 1

    done = dev.outrider("run", dev.pipeline(text), "--arg", "slots=many", "--arg", "rate=fast", "--arg", "slotz=3")
    assert done.returncode == INVALID
    for words in ("args.slots: must be a whole number", "args.rate: must be a number", "args.slotz"):
        assert words in done.stderr
    done = dev.outrider("run", dev.pipeline(text))
    assert done.returncode == INVALID
    assert "version" in done.stderr
    dev.ok("object", "set", "test/args", 'max_players="many"')
    done = dev.outrider("run", dev.pipeline(text), "--object", "test/args")
    assert done.returncode == INVALID
    assert "max_players" in done.stderr
    assert "must be a whole number" in done.stderr


def test_volumes_live_as_long_as_their_scope(dev: Dev) -> None:
    count = """
        numbers = {}
        for name in ("run", "object", "node"):
            with open(f"/{name}/log", "a+") as file:
                file.write("x")
                file.seek(0)
                numbers[name] = len(file.read())
        out(**numbers)
    """
    mounts = {"scratch": "/run:rw", "saves": "/object:rw", "shared": "/node:rw"}
    text = pipeline(
        python("count", count, volumes=mounts),
        python("again", count, volumes=mounts),
        volumes={
            "scratch": {},
            "saves": {"scope": "object", "keep": True},
            "shared": {"scope": "node", "keep": True},
        },
        writeback=[{"attribute": name, "value": f"${{{{ volumes.{name}.host_path }}}}"} for name in mounts],
    )
    for name in ("one", "two"):
        dev.ok("object", "set", f"volumes/{name}", "a=1")
    seen = []
    paths = []
    for name in ("one", "one", "two"):
        run = run_to_end(dev, text, "--object", f"volumes/{name}")
        assert steps_of(run)["count"]["outputs"] == {k: v - 1 for k, v in steps_of(run)["again"]["outputs"].items()}
        seen.append(steps_of(run)["count"]["outputs"])
        paths.append({key: Path(value) for key, value in run["writeback"].items()})
    assert seen == [
        {"run": 1, "object": 1, "node": 1},
        {"run": 1, "object": 3, "node": 3},
        {"run": 1, "object": 1, "node": 5},  # another object's run: another user, the same files of the node
    ]
    assert not any(each["scratch"].exists() for each in paths)
    assert paths[0]["saves"] == paths[1]["saves"] != paths[2]["saves"]
    assert (paths[0]["saves"] / "log").read_text() == "xxxx"
    assert (paths[2]["shared"] / "log").read_text() == "xxxxxx"


LOOK = """
    import hashlib, shutil
    INIT = shutil.which("docker-init") or "/sbin/docker-init"  # the engine's own, as process 1
    mounts = {line.split()[4]: line.split()[5].split(",")[0] for line in open("/proc/self/mountinfo")}
    refused = {}
    for path in sys.argv[1:]:
        try:
            open(path + "/probe", "w").close()
        except OSError as error:
            refused[path] = error.strerror
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    out(
        mounts={path: mode for path, mode in mounts.items() if not path.startswith(("/proc", "/sys", "/dev", INIT))},
        refused=refused,
        values={name: hashlib.sha256(os.environ[name].encode()).hexdigest() for name in os.environ},
        interfaces=sorted(os.listdir("/sys/class/net")),
        uid=os.getuid(), gid=os.getgid(), groups=os.getgroups(),
        capabilities=[status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
        no_new_privileges=status["NoNewPrivs"].strip(),
        engine=os.path.exists("/var/run/docker.sock") or os.path.exists("/outrider/control.sock"),
    )
"""


def test_a_step_sees_its_allotted_volumes_and_envs_and_nothing_else(dev: Dev) -> None:
    dev.ok("env", "set", "inside-look", "TOKEN=token-of-the-test", "KEY=key-of-the-test")
    own = {"/": "ro", "/outrider": "rw", "/tmp": "rw"} | dict.fromkeys(
        ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf"), "ro"
    )
    text = pipeline(
        python("none", LOOK, "/", "/etc", "/home", "/outrider", "/tmp", "/build"),
        python(
            "some",
            LOOK,
            "/build",
            "/data",
            volumes={"build": "/build", "data": "/data:rw"},
            envs={"KEY": "inside-look.TOKEN", "AREA": "REGION"},
        ),
        python("other", LOOK, "/area", volumes={"build": "/area:rw"}, envs=["REGION", "inside-look.KEY"]),
        envs=[{"set": "inside-look"}, {"name": "REGION", "value": "eu-1"}],
        volumes={"build": {}, "data": {}},
    )
    run = run_to_end(dev, text)
    seen = {name: step["outputs"] for name, step in steps_of(run).items()}
    plain = {
        "PATH", "HOSTNAME", "HOME", "LANG", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE",
        "OUTRIDER_CONTRACT", "OUTRIDER_RUN_ID", "OUTRIDER_STEP", "OUTRIDER_ATTEMPT",
        "OUTRIDER_NETWORK", "OUTRIDER_NETWORK_ALLOW",
    }  # fmt: skip
    assert set(seen["none"]["values"]) == plain
    assert set(seen["some"]["values"]) == plain | {"KEY", "AREA"}
    assert set(seen["other"]["values"]) == plain | {"KEY", "REGION"}
    assert seen["some"]["values"]["KEY"] == sha256(b"token-of-the-test")
    assert seen["other"]["values"]["KEY"] == sha256(b"key-of-the-test")
    assert seen["some"]["values"]["AREA"] == sha256(b"eu-1")
    assert seen["none"]["mounts"] == own
    assert seen["some"]["mounts"] == own | {"/build": "ro", "/data": "rw"}
    assert seen["other"]["mounts"] == own | {"/area": "rw"}
    # Of /outrider the files of the contract can be written, and no others made.
    assert set(seen["none"]["refused"]) == {"/", "/etc", "/home", "/build", "/outrider"}
    assert seen["none"]["refused"]["/"] == "Read-only file system"
    assert seen["some"]["refused"] == {"/build": "Read-only file system"}
    assert seen["other"]["refused"] == {}
    for name, each in seen.items():
        assert each["interfaces"] == ["lo"], name
        assert min(each["uid"], each["gid"]) > 0, name
        assert set(each["groups"]) <= {each["gid"]}, name
        assert set(each["capabilities"]) == {"0000000000000000"}, name
        assert each["no_new_privileges"] == "1", name
        assert not each["engine"], name
    assert len({each["uid"] for each in seen.values()}) == 1  # one for the run: its steps work on the same files


def test_secrets_are_masked_in_logs_and_refused_in_outputs(dev: Dev) -> None:
    secret, other = "s3cr3t/of+the=test", "line one of a key\nline two of a key"
    dev.ok("env", "set", "masked", "--from-file", "-", stdin=f"TOKEN={secret}\nKEY={json.dumps(other)}\n")
    text = pipeline(
        python(
            "print",
            """
            import base64, urllib.parse
            token, key = os.environ["TOKEN"], os.environ["KEY"]
            print("whole", token)
            for part in ("split ", token[:7], token[7:], "\\n"):
                sys.stdout.write(part)
                sys.stdout.flush()
                time.sleep(0.3)
            print("base64", base64.b64encode(f"user:{token}".encode()).decode())
            print("url", urllib.parse.quote(token, safe=""))
            print("json", json.dumps({"key": key}))
            print("lines", key, file=sys.stderr)
            with open("/outrider/progress", "a") as file:
                file.write(json.dumps({"error": f"the store refused {token}", "code": "refused"}) + "\\n")
            sys.exit(1)
            """,
            envs=["masked.TOKEN", "masked.KEY"],
            needs=[],
        ),
        python("put-out", "out(address='http://x/?' + os.environ['TOKEN'])", envs=["masked.TOKEN"], needs=[]),
        # Its value reaches the log of a step that never was allotted it, by way of a file.
        python(
            "write",
            "open('/w/t', 'w').write(os.environ['K'])",
            envs={"K": "masked.TOKEN"},
            volumes={"w": "/w:rw"},
            needs=[],
        ),
        python("read", "print('read', open('/w/t').read())", volumes={"w": "/w"}, needs=["write"]),
        envs=[{"set": "masked"}],
        volumes={"w": {}},
    )
    done = dev.outrider("run", dev.pipeline(text))
    assert done.returncode == FAILED, done.stderr
    run_id = done.stdout.strip()
    run = dev.json("runs", "show", run_id)
    steps = steps_of(run)
    assert steps["print"]["failure"]["message"].startswith("step print failed: the store refused ***")
    assert steps["put-out"]["failure"]["code"] == "secret_in_outputs"
    assert not steps["put-out"]["outputs"]
    assert states_of(run)["read"] == "succeeded"
    shown = logs(dev, run)
    for word in ("whole ***", "split ***", "base64 ", "url ***", "json ", "lines ***", "read ***"):
        assert word in shown, shown
    everything = json.dumps(run) + shown + done.stderr + dev.ok("events") + dev.log()
    for part in (secret, "dXNlcjpzM2NyM3Qvb2YrdGhlPXRlc3Q", "s3cr3t%2Fof", "line one of", "line two of"):
        assert part not in everything
    state = dev.folder / "state"
    search = ["grep", "-rlaF", "-e", secret, "-e", "line two of", state]
    deadline = time.monotonic() + 60  # what a step itself wrote goes with its directory, within half a minute
    while (found := subprocess.run(search, capture_output=True, text=True).stdout.split()) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.5)
    assert found == [], "a secret rests on the disk"


def test_what_fails_says_how_and_only_what_is_temporary_is_tried_again(dev: Dev) -> None:
    text = pipeline(
        python(
            "flaky",
            """
            attempt = int(os.environ["OUTRIDER_ATTEMPT"])
            print("try", attempt)
            out(attempt=attempt)
            sys.exit(75 if attempt < 3 else 0)
            """,
            retry={"max": 5, "first_wait": "50ms"},
            needs=[],
        ),
        python("worn-out", "print('no'); sys.exit(75)", retry={"max": 1, "first_wait": "50ms"}, needs=[]),
        python("broken", "sys.exit(7)", retry={"max": 3}, needs=[]),
        python("slow", "time.sleep(60)", timeout="1s", needs=[]),
        python("hungry", "x = bytearray(200_000_000); print(sum(x[::4096]))", resources={"memory": "32MiB"}, needs=[]),
        python(
            "forks",
            """
            children = 0
            try:
                while children < 100:
                    if os.fork() == 0:
                        time.sleep(30)
                    children += 1
            except BlockingIOError:
                out(children=children)
            """,
            resources={"pids": 17},
            needs=[],
        ),
    )
    done = dev.outrider("run", dev.pipeline(text))
    assert done.returncode == TIMED_OUT, done.stderr
    run_id = done.stdout.strip()
    shown = dev.ok("runs", "show", run_id)
    run = dev.json("runs", "show", run_id)
    steps = steps_of(run)
    assert run["state"] == "failed"
    assert (steps["flaky"]["state"], steps["flaky"]["attempt"]) == ("succeeded", 3)
    assert steps["flaky"]["outputs"] == {"attempt": 3}
    flaky = next(line for line in shown.splitlines() if line.startswith("flaky"))
    assert flaky.split()[:4] == ["flaky", "container.run", "succeeded", "3"]
    assert (steps["worn-out"]["state"], steps["worn-out"]["attempt"], steps["worn-out"]["exit_code"]) == (
        "failed",
        2,
        75,
    )
    assert (steps["broken"]["state"], steps["broken"]["attempt"], steps["broken"]["exit_code"]) == ("failed", 1, 7)
    assert steps["broken"]["failure"]["error_class"] == "permanent"
    assert "step slow did not end within its timeout" in done.stderr
    assert steps["slow"]["failure"]["error_class"] == "timeout"
    assert steps["hungry"]["failure"]["code"] == "out_of_memory"
    assert "32 MiB" in done.stderr
    assert "resources.memory" in done.stderr
    assert 10 <= steps["forks"]["outputs"]["children"] < 17
    shown_logs = logs(dev, run_id)
    assert [line.split()[-1] for line in shown_logs.splitlines() if line.startswith("flaky")] == ["1", "2", "3"]
    assert logs(dev, run_id, "flaky", "--attempt", "2") == "try 2\n"


def test_runs_of_one_object_queue_and_a_cancelled_one_leaves_nothing_running(dev: Dev) -> None:
    dev.ok("object", "set", "test/queue", "a=1")
    text = pipeline(
        python("wait", "print('waiting'); time.sleep(300)"),
        python("never", ""),
        python("tidy", "print('tidied')", when="always()"),
        name="long",
    )
    first = dev.ok("run", dev.pipeline(text, "long.yaml"), "--object", "test/queue", "--detach").strip()
    follower = subprocess.Popen([OUTRIDER, "logs", "run", first, "wait", "-f"], env=dev.env, stdout=subprocess.PIPE)
    with follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"waiting\n"
        short = dev.pipeline(pipeline(python("go", "print('went')")), "short.yaml")
        second = dev.ok("run", short, "--object", "test/queue", "--detach").strip()
        queued = dev.json("runs", "show", second)
        assert queued["state"] == "queued"
        assert first in queued["reason"]
        busy = dev.outrider("run", short, "--object", "test/queue", "--refuse-if-busy")
        assert busy.returncode == FAILED
        assert first in busy.stderr
        done = dev.outrider("runs", "cancel", first, "--reason", "changed our minds", "--wait")
        assert done.returncode == 0, done.stderr
        assert follower.wait(20) == 0
    run = dev.json("runs", "show", first)
    assert run["state"] == "cancelled"
    assert "changed our minds" in run["failure"]["message"]
    assert states_of(run) == {"wait": "cancelled", "never": "cancelled", "tidy": "succeeded"}
    assert dev.ok("logs", "run", second, "-f") == "went\n"
    assert dev.json("runs", "show", second)["state"] == "succeeded"
    left = ["docker", "ps", "--quiet", f"--filter=label=outrider.run={first}"]
    assert subprocess.run(left, capture_output=True, text=True, check=True).stdout == ""
