"""A server process, an agent process and TLS between them, which may be killed, frozen, armed and started again.

    with Rig.start() as rig:
        run = rig.execute(pipeline(rig.step("a"), rig.step("b")))
        rig.agent.kill()
        rig.start_agent(failpoints="journal.attempt_settled.before=kill")
        assert rig.agent.wait() == -signal.SIGKILL
        rig.start_agent()
        assert rig.ended(run).state == types.RUN_STATE_SUCCEEDED
        rig.check()

The steps that `Rig.step` makes leave a mark each time they are run, and write a log of which every byte is known:
`tests/faults/checker.py` compares them, the engine, the agent and the server.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from agent_core.status import read_status
from outrider.errors import OutriderError
from outrider.tls import CLIENT_OPTIONS
from outrider.v1 import control_service_pb2 as cs
from outrider.v1 import control_service_pb2_grpc
from outrider.v1 import types_pb2 as types
from tests.faults.launcher import OUTRIDER, Child, Launcher

BASE = "outrider/base:1"
TERMINAL = (
    types.RUN_STATE_SUCCEEDED,
    types.RUN_STATE_FAILED,
    types.RUN_STATE_CANCELLED,
    types.RUN_STATE_UNKNOWN,
)
PATIENCE_S = 60.0
TALLY = "OUTRIDER_TEST_TALLY"
"""In the environment: a file that gets a line of JSON for each rig, with its kills and its runs."""

_HELD = """
n=0
until [ -e "/marks/go-{name}" ] || [ $n -gt 1200 ]; do n=$((n+1)); sleep 0.05; done
"""
_SCRIPT = """
echo "$OUTRIDER_ATTEMPT" >> "/marks/ran-$OUTRIDER_RUN_ID-$OUTRIDER_STEP"
i=0
while [ $i -lt {half} ]; do echo "{name} line $i"; i=$((i+1)); {pause} done
echo "{name} warns" >&2
{held}
while [ $i -lt {lines} ]; do echo "{name} line $i"; i=$((i+1)); {pause} done
{then}
"""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a step writes at each of its attempts, however often it is killed beside."""

    stdout: bytes
    stderr: bytes


def step_of(
    name: str, *, lines: int = 20, pause_s: float = 0.0, held: bool = False, then: str = "", **fields: Any
) -> dict[str, Any]:
    """A step for a fault test: a mark, ``lines`` lines half and half, ``then`` a line of shell.

    ``held``: between the halves it waits until `Rig.release` is called with its name.
    """
    script = _SCRIPT.format(
        name=name,
        half=lines // 2,
        lines=lines,
        pause=f"sleep {pause_s};" if pause_s else "",
        held=_HELD.format(name=name) if held else "",
        then=then,
    )
    step = {
        "name": name,
        "uses": "container.run",
        "with": {"image": BASE, "args": ["sh", "-c", script]},
        "volumes": {"marks": "/marks:rw"},
    }
    return step | fields


def expected_of(name: str, lines: int = 20) -> Expected:
    """What a step made by `step_of` writes, if it comes to its end."""
    return Expected("".join(f"{name} line {i}\n" for i in range(lines)).encode(), f"{name} warns\n".encode())


def pipeline(*steps: Mapping[str, Any], name: str = "faults", **top: Any) -> str:
    """The text of a pipeline of such steps; JSON is YAML."""
    volumes = {"marks": {"scope": "node"}} | top.pop("volumes", {})
    return json.dumps({"name": name, "volumes": volumes, "steps": list(steps)} | top)


class Operator:
    """The ControlService, called for as long as it takes a server to be back. Every call carries one request id."""

    def __init__(self, address: str, ca: bytes, token: str) -> None:
        self._address, self._ca = address, ca
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._channel: grpc.Channel | None = None
        self.says: Callable[[], str] = str
        """What is worth knowing when a call fails."""

    def call(self, method: str, request: Any, *, within_s: float = PATIENCE_S, timeout_s: float = 10.0) -> Any:
        """One unary call, repeated while the server is away. Raises grpc.RpcError for what it refuses."""
        if "request_id" in request.DESCRIPTOR.fields_by_name and not request.request_id:
            request.request_id = secrets.token_hex(8)
        deadline = time.monotonic() + within_s
        while True:
            try:
                stub = control_service_pb2_grpc.ControlServiceStub(self._open())
                return getattr(stub, method)(request, metadata=self._metadata, timeout=timeout_s)
            except grpc.RpcError as error:
                away = isinstance(error, grpc.Call) and error.code() in (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    grpc.StatusCode.CANCELLED,
                )
                if not away or time.monotonic() > deadline:
                    error.add_note(f"{method}\n{self.says()}")
                    raise
                self.close()  # a channel of its own waits longer and longer before it looks again
                time.sleep(0.1)

    def stream(self, method: str, request: Any, *, timeout_s: float = 20.0) -> Iterator[Any]:
        """A server stream, from a server that is there."""
        stub = control_service_pb2_grpc.ControlServiceStub(self._open())
        yield from getattr(stub, method)(request, metadata=self._metadata, timeout=timeout_s)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _open(self) -> grpc.Channel:
        if self._channel is None:
            credentials = grpc.ssl_channel_credentials(root_certificates=self._ca)
            self._channel = grpc.secure_channel(self._address, credentials, options=CLIENT_OPTIONS)
        return self._channel


class EngineRecord:
    """What the engine did with the containers of one node, from its own events, while agents came and went."""

    def __init__(self, node_id: str, engine: str | None) -> None:
        self._command = ["docker", *(["-H", engine] if engine else []), "events", "--format", "{{json .}}"]
        self._command += ["--filter", "type=container", "--filter", f"label=outrider.node={node_id}"]
        self._lock = threading.Lock()
        self._events: dict[tuple[str, str, int], str] = {}
        self._since = f"{time.time():.6f}"
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def of(self, action: str) -> dict[str, list[str]]:
        """The ids of the containers to which this happened ("start", "create"…), once for each time, by name."""
        found: dict[str, list[str]] = {}
        with self._lock:
            for (happened, container, _), name in self._events.items():
                if happened == action:
                    found.setdefault(name, []).append(container)
        return found

    def close(self) -> None:
        self._closed = True
        if self._process is not None:
            self._process.terminate()
        self._thread.join(10)

    def _record(self) -> None:
        while not self._closed:
            # What happened before it was there is replayed; seen twice it is the same key.
            self._process = subprocess.Popen(
                [*self._command, "--since", self._since], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            with self._process as process:
                assert process.stdout is not None
                for line in process.stdout:
                    event = json.loads(line)
                    key = (event["Action"].partition(":")[0], event["Actor"]["ID"], event["timeNano"])
                    with self._lock:
                        self._events[key] = event["Actor"]["Attributes"].get("name", "")
                    self._since = f"{event['timeNano'] // 10**9}.{event['timeNano'] % 10**9:09d}"
            time.sleep(0.2)  # the engine went away


@dataclass
class Rig:
    """One server and one agent. ``accepted``: the runs that a caller was told of, with what their steps write."""

    folder: Path
    node_id: str
    address: str
    operator: Operator
    launcher: Launcher
    record: EngineRecord
    engine: str | None
    server_env: dict[str, str] = field(default_factory=dict)
    agent_env: dict[str, str] = field(default_factory=dict)
    server_prefix: tuple[str, ...] = ()
    agent_prefix: tuple[str, ...] = ()
    accepted: dict[str, dict[str, Expected]] = field(default_factory=dict)
    server: Child = field(init=False)
    agent: Child = field(init=False)
    kills: int = 0

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        *,
        engine: str | None = None,
        agent: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
        launcher: Launcher | None = None,
        running: bool = True,
    ) -> Iterator[Rig]:
        """Both processes, with the node online. ``engine``: a socket (``unix://…``) other than the machine's.

        ``agent`` and ``policy`` are added to the agent's and the node's files; ``running=False`` starts neither.
        """
        own_launcher = launcher is None
        launcher = launcher or Launcher()
        # Not pytest's tmp_path: that one is closed to others, and volumes are written by other users.
        folder = Path("/var/tmp") / f"outrider-faults-{secrets.token_hex(6)}"
        folder.mkdir(mode=0o711)
        rig = None
        try:
            rig = cls._prepare(folder, launcher, engine, agent or {}, policy or {})
            rig.operator.says = rig.situation
            if running:
                rig.start_server()
                rig.start_agent()
                rig.until_online()
            yield rig
        finally:
            try:
                if rig is not None:
                    rig.close()
            finally:
                if own_launcher:
                    launcher.close()
                shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def _prepare(
        cls, folder: Path, launcher: Launcher, engine: str | None, agent: Mapping[str, Any], policy: Mapping[str, Any]
    ) -> Rig:
        node_id = f"faults-{secrets.token_hex(4)}"
        address = f"127.0.0.1:{free_port()}"
        server = {"listen": address, "data_dir": str(folder / "server"), "heartbeat_interval_s": 0.5}
        (folder / "server.yaml").write_text(json.dumps(server))
        (folder / "output.log").touch(mode=0o600)
        done = subprocess.run(
            [OUTRIDER, "server", "init", "--config", folder / "server.yaml", "-o", "json"],
            capture_output=True, text=True, check=False, env=_environment(folder),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        rules = {
            "warm_none": 1,
            "networks": {"egress": {"network": "outrider", "warm": 0}},
            "disk_reserve_bytes": 0,
            "ports": {"range": f"{_first_port()}-{_first_port() + 99}"},
        }
        (folder / "policy.yaml").write_text(json.dumps(rules | dict(policy)))
        settings: dict[str, Any] = {
            "node_id": node_id,
            "server": address,
            "ca_file": made["ca"],
            "token_file": str(folder / "token"),
            "state_dir": str(folder / "agent"),
            "policy_file": str(folder / "policy.yaml"),
            "cancel_grace_s": 1,
        }
        if engine is not None:
            settings["engine_socket"] = engine.removeprefix("unix://")
        (folder / "agent.yaml").write_text(json.dumps(settings | dict(agent)))
        return cls(
            folder=folder,
            node_id=node_id,
            address=address,
            operator=Operator(address, Path(made["ca"]).read_bytes(), made["token"]),
            launcher=launcher,
            record=EngineRecord(node_id, engine),
            engine=engine,
        )

    # -- processes

    @property
    def state_dir(self) -> Path:
        """The agent's."""
        return self.folder / "agent"

    @property
    def journal(self) -> Path:
        return self.state_dir / "journal.db"

    @property
    def store(self) -> Path:
        return self.folder / "server" / "store.db"

    def start_server(self, *, failpoints: str = "", **env: str) -> Child:
        """Start the server; it may die of a failpoint before it serves."""
        arguments = ["server", "run", "--config", self.folder / "server.yaml"]
        self.server = self._launch(arguments, self.server_env | env, failpoints, self.server_prefix)
        return self.server

    def start_agent(self, *, failpoints: str = "", **env: str) -> Child:
        """Start the agent; it may die of a failpoint before it is connected."""
        if not (self.folder / "token").exists():
            added = self.operator.call("AddNode", cs.AddNodeRequest(node_id=self.node_id))
            (self.folder / "token").write_text(added.token)
        arguments = ["agent", "run", "--config", self.folder / "agent.yaml"]
        self.agent = self._launch(arguments, self.agent_env | env, failpoints, self.agent_prefix)
        return self.agent

    def kill_agent(self) -> None:
        """SIGKILL to the agent, and a new one."""
        self.agent.kill()
        self.kills += 1
        self.start_agent()

    def kill_server(self) -> None:
        """SIGKILL to the server, and a new one."""
        self.server.kill()
        self.kills += 1
        self.start_server()

    def _launch(
        self, arguments: list[object], extra: Mapping[str, str], failpoints: str, prefix: tuple[str, ...]
    ) -> Child:
        env = _environment(self.folder) | dict(extra)
        if failpoints:
            env["OUTRIDER_FAILPOINTS"] = failpoints
        output = self.folder / "output.log"
        if prefix:
            return self.launcher.exec(arguments, env, output, prefix)
        return self.launcher.start(arguments, env, output)

    # -- what an operator does

    def execute(
        self,
        text: str,
        *,
        key: str = "",
        object_: str = "",
        expected: Mapping[str, Expected] | None = None,
        timeout_s: float = 0,
        within_s: float = PATIENCE_S,
    ) -> str:
        """Have a pipeline accepted; the run's id. ``object_``: "kind/name", which must exist.

        ``expected``: what its steps write, where that is not what `expected_of` says for their names.
        """
        data = text.encode()
        request = cs.ExecutePipelineRequest(
            pipeline_yaml=data,
            pipeline_sha256=hashlib.sha256(data).digest(),
            node_id=self.node_id,
            key=key,
            allow_offline=True,
        )
        if object_:
            request.object.kind, _, request.object.name = object_.partition("/")
        if timeout_s:
            request.timeout.FromMilliseconds(int(timeout_s * 1000))
        run = self.operator.call("ExecutePipeline", request, within_s=within_s)
        names = [step["name"] for step in json.loads(text)["steps"] if "ran-$OUTRIDER" in str(step.get("with"))]
        self.accepted[run.run_id] = {name: expected_of(name) for name in names} | dict(expected or {})
        return str(run.run_id)

    def cancel(self, run_id: str, reason: str = "a test") -> None:
        self.operator.call("CancelRun", cs.CancelRunRequest(run_id=run_id, reason=reason))

    def set_object(self, ref: str, **attributes: Any) -> None:
        kind, _, name = ref.partition("/")
        request = cs.SetObjectRequest(attributes_json=json.dumps(attributes).encode())
        request.ref.kind, request.ref.name = kind, name
        self.operator.call("SetObject", request)

    def run(self, run_id: str) -> types.Run:
        """The run as the server has it."""
        run: types.Run = self.operator.call("GetRun", cs.GetRunRequest(run_id=run_id))
        return run

    def node(self) -> types.Node:
        node: types.Node = self.operator.call("GetNode", cs.GetNodeRequest(node_id=self.node_id))
        return node

    def status(self) -> dict[str, Any]:
        """What the agent says of itself; {} while it is not there."""
        try:
            return read_status(self.state_dir)
        except OutriderError:
            return {}

    def release(self, step: str) -> None:
        """Let a held step go on."""
        (self.marks / f"go-{step}").touch()

    @property
    def marks(self) -> Path:
        """The volume in which steps leave marks."""
        return self.state_dir / "volumes" / "node" / "marks"

    # -- waiting

    def until(self, holds: Callable[[], Any], within_s: float = PATIENCE_S, what: str = "it") -> Any:
        """What ``holds`` gave as soon as it is true."""
        deadline = time.monotonic() + within_s
        while not (found := holds()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come to hold within {within_s:g} s\n{self.output()}")
            time.sleep(0.05)
        return found

    def until_online(self) -> None:
        self.until(lambda: self.node().online, what="the node online")

    def ended(self, run_id: str, within_s: float = PATIENCE_S) -> types.Run:
        """The run once the server has its end."""
        run: types.Run = self.until(lambda: self._if_over(run_id), within_s, f"the end of run {run_id}")
        return run

    def _if_over(self, run_id: str) -> types.Run | None:
        run = self.run(run_id)
        return run if run.state in TERMINAL else None

    def step_state(self, run_id: str, step: str) -> int:
        """The state of a step as the server has it."""
        return next((each.state for each in self.run(run_id).steps if each.name == step), 0)

    def until_running(self, run_id: str, step: str) -> str:
        """Until the step's container runs, its mark left; the container's name."""
        self.until(lambda: (self.marks / f"ran-{run_id}-{step}").exists(), what=f"step {step} running")
        return f"outrider-{run_id}-{step}-1"

    # -- the end

    def check(self, **options: Any) -> None:
        """Compare server, agent, engine and disk once everything has settled; fails with every difference."""
        from tests.faults.checker import check

        check(self, **options)

    def docker(self, *arguments: str) -> str:
        """The engine's own command; its output."""
        command = ["docker", *(["-H", self.engine] if self.engine else []), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def output(self) -> str:
        """The end of what both processes said."""
        return (self.folder / "output.log").read_text(errors="replace")[-12000:]

    def situation(self) -> str:
        """How both processes ended, if they did, and the end of what they said."""
        ends = {name: child.poll() for name in ("agent", "server") if (child := getattr(self, name, None)) is not None}
        return f"ended with: {ends}\n{self.output()}"

    def close(self) -> None:
        """Kill both, and remove every container of this node."""
        for name in ("agent", "server"):
            child: Child | None = getattr(self, name, None)
            if child is not None:
                child.thaw()
                child.kill()
        self.operator.close()
        self.record.close()
        if tally := os.environ.get(TALLY):
            with open(tally, "a") as file:
                file.write(json.dumps({"kills": self.kills, "runs": len(self.accepted)}) + "\n")
        with contextlib.suppress(AssertionError):  # an engine of the test's own may be gone
            while found := self.docker("ps", "-aq", "--filter", f"label=outrider.node={self.node_id}").split():
                self.docker("rm", "-fv", *found)


def _first_port() -> int:
    """Of the node's range. Rigs of other workers are other nodes on this one machine."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return 27000 + 100 * (int(worker) % 15)


def free_port() -> int:
    """A TCP port that nobody has now, nor is given by the kernel while the server is away that is to have it again: it
    hands out those from 32768 on, and a connection keeps one for as long as it lives."""
    while True:
        port = secrets.choice(range(12000, 20000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _environment(folder: Path) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")}
    return env | {"OUTRIDER_CONTEXT": str(folder / "context.yaml")}
