"""The schema that a server gives, in the language server that editors use for YAML, by the first line of a pipeline.

It is installed with npm into .build/editor when it is not on the PATH.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

from agent_core.plugins import PluginHost
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2 as tpb
from outrider.wire import dump_json
from tests.integration.server_rig import Rig, add_node, served

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
VERSION = "1.25.0"

PIPELINE = """\
# yaml-language-server: $schema=./pipeline.schema.json
name: deploy
args: {key: {type: string}}
envs: [{set: builds}]
volumes: {build: {}}
steps:
  - name: fetch
    uses: s3.download
    with: {bucket: builds, key: "${{ args.key }}", to: /build/a}
    volumes: {build: "/build:rw"}
    envs: {S3_ENDPOINT: builds.ENDPOINT}
"""


def installed() -> str:
    found = shutil.which("yaml-language-server")
    if found:
        return found
    folder = ROOT / ".build" / "editor"
    program = folder / "node_modules" / ".bin" / "yaml-language-server"
    if not program.exists():
        if shutil.which("npm") is None:
            pytest.skip("neither yaml-language-server nor npm is installed")
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder)]
        subprocess.run([*command, f"yaml-language-server@{VERSION}"], check=True, capture_output=True, timeout=100)
    return str(program)


class Editor:
    """As much of an editor as speaks the language server protocol over pipes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [installed(), "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._messages: Queue[dict[str, Any]] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._number = 0
        self._versions: dict[str, int] = {}
        self.ask("initialize", {"processId": None, "rootUri": folder.as_uri(), "capabilities": {}})
        self.tell("initialized", {})
        settings = {"yaml": {"validate": True, "completion": True, "hover": True, "schemaStore": {"enable": False}}}
        self.tell("workspace/didChangeConfiguration", {"settings": settings})

    def _read(self) -> None:
        out = self._process.stdout
        assert out is not None
        while True:
            length = 0
            while line := out.readline().strip():
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            if not length:
                return
            self._messages.put(json.loads(out.read(length)))

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
        self._process.stdin.flush()

    def tell(self, method: str, params: dict[str, Any]) -> None:
        self._send({"method": method, "params": params})

    def _until(self, wanted: Any) -> dict[str, Any]:
        while True:
            try:
                message = self._messages.get(timeout=60)
            except Empty:
                raise AssertionError("the language server said nothing for a minute") from None
            if wanted(message):
                return message
            if "method" in message and "id" in message:  # it asks for its settings and the like
                items = message["params"].get("items", []) if isinstance(message.get("params"), dict) else []
                self._send({"id": message["id"], "result": [None] * len(items) if items else None})

    def ask(self, method: str, params: dict[str, Any]) -> Any:
        self._number += 1
        number = self._number
        self._send({"id": number, "method": method, "params": params})
        answer = self._until(lambda message: message.get("id") == number and "method" not in message)
        assert "error" not in answer, answer
        return answer["result"]

    def problems(self, text: str) -> list[tuple[int, str]]:
        """What it says of a pipeline: lines, counted from 1, and messages."""
        self._number += 1
        uri = (self.folder / f"pipeline-{self._number}.yaml").as_uri()
        self.tell(
            "textDocument/didOpen", {"textDocument": {"uri": uri, "languageId": "yaml", "version": 1, "text": text}}
        )
        told = self._until(
            lambda message: (
                message.get("method") == "textDocument/publishDiagnostics" and message["params"]["uri"] == uri
            )
        )
        self.uri = uri
        found = [(each["range"]["start"]["line"] + 1, each["message"]) for each in told["params"]["diagnostics"]]
        return sorted(found)

    def offered(self, text: str, after: str) -> set[str]:
        """What it completes the end of ``after`` with."""
        self.problems(text)
        before = text[: text.index(after) + len(after)]
        position = {"line": before.count("\n"), "character": len(before) - before.rfind("\n") - 1}
        answer = self.ask("textDocument/completion", {"textDocument": {"uri": self.uri}, "position": position})
        items = answer["items"] if isinstance(answer, dict) else answer or []
        return {str(item["label"]) for item in items}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def reported() -> list[tpb.StepTypeInfo]:
    """The step types of the plugins installed here, as an agent reports them."""
    return [
        tpb.StepTypeInfo(
            name=each.name,
            distribution=each.distribution,
            version=each.version,
            description=each.description,
            params_schema_json=dump_json(each.params_schema),
            envs=each.envs,
        )
        for each in PluginHost.load().step_types.values()
    ]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with served(tmp_path / "server") as rig:
        yield rig


@pytest.fixture
async def schema(rig: Rig, tmp_path: Path) -> Path:
    agent = await add_node(rig)
    agent.step_types = reported()
    await agent.start()
    async with rig.operator() as control:
        await control.SetEnvSet(
            pb.SetEnvSetRequest(request_id="e", name="builds", values={"ENDPOINT": "x"}), timeout=10
        )
        answer = await control.GetPipelineSchema(pb.GetPipelineSchemaRequest(), timeout=10)
    await agent.stop()
    file = tmp_path / "pipeline.schema.json"
    file.write_bytes(answer.schema_json)
    return file


@pytest.fixture
def editor(schema: Path) -> Iterator[Editor]:
    editor = Editor(schema.parent)
    yield editor
    editor.close()


def test_an_editor_checks_and_completes_with_the_servers_schema(editor: Editor) -> None:
    assert editor.problems(PIPELINE) == []
    for old, new, line, words in (
        ("bucket: builds, ", "", 9, "bucket"),
        ("to: /build/a", "to: /build/a, tos: 1", 9, "tos"),
        ("to: /build/a", "to: build/a", 9, "pattern"),
        ("S3_ENDPOINT:", "S3_ENDPIONT:", 11, "S3_ENDPIONT"),
        ("uses: s3.download", "uses: s3.downlaod", 8, '"s3.download", "s3'),
        ("volumes: {build: {}}", "volumes: {build: {scope: all}}", 5, "run"),
    ):
        problems = editor.problems(PIPELINE.replace(old, new, 1))
        assert [where for where, said in problems if words in said] == [line], problems
    assert {"s3.download", "s3.upload", "archive.extract", "container.start", "http.download"} <= editor.offered(
        PIPELINE.replace("uses: s3.download", "uses: "), "uses: "
    )
    block = PIPELINE[: PIPELINE.index("    with:")]
    assert {"bucket", "key", "to"} <= editor.offered(f"{block}    with:\n      \n", "    with:\n      ")
    assert "S3_ENDPOINT" in editor.offered(f"{block}    envs:\n      \n", "    envs:\n      ")
    assert "builds" in editor.offered(PIPELINE.replace("{set: builds}", "{set: }"), "{set: ")
