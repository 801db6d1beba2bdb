"""What one attempt is made from, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_core.runtimes.base import (
    LABEL_ATTEMPT,
    LABEL_BOOT,
    LABEL_KIND,
    LABEL_LEASE,
    LABEL_NODE,
    LABEL_OBJECT,
    LABEL_PLAN,
    LABEL_RUN,
    LABEL_STEP,
    ContainerSpec,
    Mount,
)
from agent_core.state import Change
from agent_core.volumes import AllottedVolume
from outrider.errors import OutriderError
from outrider.steps import CONTRACT_VERSION, Resources, StepPlan


@dataclass(frozen=True)
class AttemptOrder:
    """All that one attempt is made from."""

    run_id: str
    lease_id: str
    step: str
    number: int
    plan: StepPlan
    plan_sha256: str
    inputs: bytes
    env: Mapping[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)  # what its log is masked with
    volumes: Mapping[str, tuple[AllottedVolume, str, bool]]  # volume, path inside, writable
    uid: int
    gid: int
    resources: Resources
    object_ref: str | None
    timeout_s: float  # what is left of it
    masked: bool = False  # ``secrets`` are those of its run; otherwise they were not known when it began
    unavailable: OutriderError | None = None  # why an adopted one's envs and secrets could not be had
    engine_boot: str = ""  # of the engine that the journal says it was started by; "": the present one

    @property
    def container(self) -> str:
        """The container's name."""
        return f"outrider-{self.run_id}-{self.step}-{self.number}"

    @property
    def runs_as(self) -> tuple[int, int]:
        """uid and gid of its processes: the allotted ones, or those of an image that can't run as them."""
        if self.plan.user is None:
            return self.uid, self.gid
        uid, _, gid = self.plan.user.partition(":")
        return int(uid), int(gid) if gid else self.gid

    @property
    def shared(self) -> list[str]:
        """Volumes on the node that it writes to as another user than the one they belong to."""
        if self.runs_as[0] == self.uid:
            return []
        return [volume.host_path for volume, _, writable in self.volumes.values() if writable]

    def labels(self, node_id: str) -> dict[str, str]:
        """What the container is found by after a restart."""
        labels = {
            LABEL_NODE: node_id,
            LABEL_KIND: "step",
            LABEL_RUN: self.run_id,
            LABEL_STEP: self.step,
            LABEL_ATTEMPT: str(self.number),
            LABEL_LEASE: self.lease_id,
            LABEL_PLAN: self.plan_sha256,
        }
        # Always there: what is left out comes from the image, which could name anybody's object.
        return labels | {LABEL_OBJECT: self.object_ref or ""}

    def _groups(self) -> set[int]:
        groups = {each.group for each, _, _ in self.volumes.values() if each.group is not None}
        # Volumes belong to the allotted group: a process of another one reaches them as a member of it.
        return groups | {self.gid} if self.runs_as[1] != self.gid else groups

    def spec(
        self,
        *,
        node_id: str,
        directory: Path,
        network: str,
        log_max_bytes: int,
        told: Mapping[str, str] | None = None,
        oci_runtime: str = "",
        engine_boot: str = "",
    ) -> ContainerSpec:
        """The container: the sandbox of the defaults, and what the plan and the allotment add to it.

        ``told`` is what the node tells the program, as further environment variables of the core's.
        """
        plan = self.plan
        env = dict(plan.env) | dict(self.env)
        env |= {
            "OUTRIDER_CONTRACT": str(CONTRACT_VERSION),
            "OUTRIDER_RUN_ID": self.run_id,
            "OUTRIDER_STEP": self.step,
            "OUTRIDER_ATTEMPT": str(self.number),
        }
        env |= told or {}
        env.setdefault("HOME", "/tmp")  # noqa: S108 - the container's own tmpfs
        if plan.control is not None:
            env["OUTRIDER_CONTROL"] = "/outrider/control.sock"
        mounts = [Mount(str(directory), "/outrider", writable=True)]
        mounts += [Mount(volume.host_path, path, writable) for volume, path, writable in self.volumes.values()]
        return ContainerSpec(
            name=self.container,
            image=plan.image,
            args=plan.args,
            entrypoint=plan.entrypoint,
            env=env,
            labels=self.labels(node_id) | {LABEL_BOOT: engine_boot},
            mounts=tuple(mounts),
            user="{}:{}".format(*self.runs_as),
            groups=tuple(sorted(self._groups())),
            workdir=plan.workdir,
            network=network,
            memory_bytes=self.resources.memory_bytes,
            cpus=self.resources.cpus,
            pids=self.resources.pids,
            log_max_bytes=log_max_bytes,
            oci_runtime=oci_runtime,
            init=True,
        )


@dataclass
class AttemptResult:
    """How it ended. ``error`` is None if it succeeded; ``uncertain``: whether its work was done can't be known."""

    exit_code: int | None = None
    error: OutriderError | None = None
    cancelled: bool = False
    uncertain: bool = False
    outputs: dict[str, Any] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    log_bytes: tuple[int, int] = (0, 0)
