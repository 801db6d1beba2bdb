"""From what a managed container is asked to be to what the engine is told: names, labels, mounts and ports."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from agent_core.container_spec import (
    ContainerScope,
    ManagedSpec,
    check_against_policy,
    device_of,
    digest_of,
    mounts_of,
    substitute,
)
from agent_core.liveness import supervision_of
from agent_core.managed_files import ManagedFiles
from agent_core.managed_rows import Intent
from agent_core.policy import NodePolicy, capability_name
from agent_core.runtimes.base import (
    LABEL_ATTEMPT,
    LABEL_KIND,
    LABEL_NAME,
    LABEL_NETWORK,
    LABEL_NODE,
    LABEL_OBJECT,
    LABEL_PORTS,
    LABEL_RUN,
    LABEL_SECRETS,
    LABEL_SPEC,
    LABEL_STEP,
    LABEL_SUPERVISION,
    ContainerInfo,
    ContainerSpec,
    Mount,
    PortBinding,
)
from outrider.masking import contains_secret
from outrider.steps import Resources


@dataclass(frozen=True, slots=True)
class Order:
    """A specification with all that follows from it, from whom asked, and from the node."""

    spec: ManagedSpec
    scope: ContainerScope
    mounts: tuple[Mount, ...]
    files: tuple[Mount, ...]
    user: str
    digest: str
    network: str
    limits: Resources

    def intent(self, supervision: str = "{}") -> Intent:
        return Intent(self.digest, self.scope, self.spec.stop_grace_s, supervision)

    @property
    def groups(self) -> tuple[int, ...]:
        """Further groups: of what all owners share, and the allotted one for a user that is another."""
        of_volumes = {g.group for n, g in self.scope.volumes.items() if n in self.spec.volumes and g.group}
        return tuple(sorted(of_volumes | {self.scope.gid} if self.as_another else of_volumes))

    @property
    def as_another(self) -> bool:
        """Whether it runs as another user than the one that its volumes belong to."""
        return self.user != f"{self.scope.uid}:{self.scope.gid}"

    def is_made_as(self, info: ContainerInfo) -> bool:
        return info.labels.get(LABEL_SPEC) == self.digest


class Orders:
    """Makes them on one node."""

    def __init__(self, policy: NodePolicy, files: ManagedFiles, node_id: str) -> None:
        self._policy = policy
        self._files = files
        self._node_id = node_id

    def of(self, spec: ManagedSpec, scope: ContainerScope) -> Order:
        """What follows from the specification. PolicyViolation if the node must not run it."""
        network, limits = check_against_policy(spec, self._policy)
        mounts = mounts_of(spec, scope)
        user = spec.user or f"{scope.uid}:{scope.gid}"
        digest = digest_of(spec, mounts, user)
        files = self._files.mounts(spec.name, digest, spec.files)
        return Order(spec, scope, mounts, files, user, digest, network, limits)

    def container(self, order: Order, name: str, ports: dict[str, int], private: str) -> ContainerSpec:
        """What the engine is told. ``private``: the network of its object, "" for none."""
        spec = order.spec
        alone = private and order.network == "none"  # the engine joins nothing else to one without a network
        return ContainerSpec(
            name=name,
            image=spec.image,
            args=tuple(substitute(arg, ports) for arg in spec.args),
            entrypoint=None if spec.entrypoint is None else tuple(substitute(e, ports) for e in spec.entrypoint),
            env={name: substitute(value, ports) for name, value in spec.env.items()},
            labels=self._labels(order, ports, private),
            mounts=(*order.mounts, *order.files),
            user=order.user,
            groups=order.groups,
            workdir=spec.workdir,
            network=private if alone else order.network,
            aliases=tuple(aliases_of(spec)) if alone else (),
            read_only_root=not spec.writable_root,
            tmp_size_bytes=spec.tmp_size_bytes,
            cap_add=tuple(capability_name(name) for name in spec.capabilities),
            devices=tuple(device_of(each) for each in spec.devices),
            memory_bytes=order.limits.memory_bytes,
            cpus=order.limits.cpus,
            pids=order.limits.pids,
            ports=() if order.network == "host" else self._bindings(spec, ports),
            restart_policy=spec.restart.policy,
            restart_max=spec.restart.max,
            log_max_bytes=self._policy.limits.managed_log_bytes,
            log_files=self._policy.limits.managed_log_files,
            stop_signal=spec.stop_signal,
            init=spec.init,
        )

    def _labels(self, order: Order, ports: dict[str, int], private: str) -> dict[str, str]:
        spec, scope = order.spec, order.scope
        labels = {
            **spec.labels,
            LABEL_NODE: self._node_id,
            LABEL_KIND: "managed",
            LABEL_NAME: spec.name,
            LABEL_SPEC: order.digest,
            LABEL_RUN: scope.run_id,
            LABEL_STEP: scope.step,
            LABEL_ATTEMPT: str(scope.attempt),
        }
        if ports:
            # Names are the journal's alone otherwise, and a journal can be lost.
            labels[LABEL_PORTS] = ",".join(
                f"{wish.name}={ports[wish.name]}/{protocol}" for wish in spec.wishes() for protocol in wish.protocols
            )
        if spec.live is not None:
            labels[LABEL_SUPERVISION] = supervision_of(spec, ports)
        if private:
            labels[LABEL_NETWORK] = private
        # Always there: what is left out comes from the image, which could name anybody's object.
        labels[LABEL_OBJECT] = scope.object_ref or ""
        values = {name: value.replace("$$(", "$(") for name, value in spec.env.items()}  # as the container gets them
        secret = [name for name, value in values.items() if contains_secret(value.encode(), scope.secrets)]
        if secret:
            # Its log outlives the run, which alone knows what is secret: the names rest with the container.
            labels[LABEL_SECRETS] = ",".join(sorted(secret))
        return labels

    def _bindings(self, spec: ManagedSpec, ports: dict[str, int]) -> tuple[PortBinding, ...]:
        return tuple(
            PortBinding(
                container=port.container or ports[port.name],
                host=ports[port.name],
                protocol=protocol,
                host_ip=self._policy.ports.address_of(port.interface),
                name=port.name,
            )
            for port in spec.ports
            for protocol in port.wish.protocols
        )


def advertised_address(policy: NodePolicy) -> str:
    """Where players find the published ports: what the policy says, else the address of the default route."""
    if policy.ports.advertise:
        return policy.ports.advertise
    if policy.ports.interface not in ("0.0.0.0", "::"):
        return policy.ports.interface
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: a documentation address; UDP's connect sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def aliases_of(spec: ManagedSpec) -> list[str]:
    """Its names on the private network: the engine's own is another while it takes somebody's place."""
    return [spec.name, *spec.aliases]
