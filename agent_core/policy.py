"""The node's local policy: what may run here. A YAML file that the server can't override.

Everything has a sane default, so that a node without a file is safe: any image, steps without network or
with outgoing traffic only, managed containers without added capabilities, foreign containers untouched.
"""

from __future__ import annotations

import ipaddress
import re
from fnmatch import fnmatchcase
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agent_core.image_policy import ImagePolicy
from outrider._model_errors import problems_of
from outrider._yaml import read_document
from outrider.errors import InvalidInput, PolicyViolation
from outrider.steps import Resources, StepPlan

DEFAULT_NETWORK = "outrider"
AUTO_RUNTIME = "auto"
"""``oci_runtime``: crun where the engine offers it and it works, otherwise its default (docs/decisions/0015)."""
PRIVATE_RANGES = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
"""What ``allow: [private]`` means: RFC 1918, RFC 6598 (carriers, and the overlay networks that borrow it), RFC 4193."""
PRIVATE_PREFIX = 27
"""How large a network that containers of one object share is: 29 addresses for them."""
INTERFACE_NAME = r"^[a-z][a-z0-9_-]{0,31}$"
_MIB = 1024**2
_INTERFACE = re.compile(INTERFACE_NAME)
# Digits alone: the engine takes "+0" for 0, too.
_STEP_USER = re.compile(r"[1-9][0-9]{0,9}(:[1-9][0-9]{0,9})?", re.ASCII)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PortPolicy(_Section):
    """``range``: host ports for managed containers, ``"27000-27999"``. ``interface``: the address where they listen.
    ``interfaces``: other addresses of this node that a port may ask for, by the name that pipelines have for them.
    ``advertise``: the address told to others; empty: the one that the node's default route uses."""

    range: tuple[int, int] = (27000, 27999)
    interface: str = "0.0.0.0"
    interfaces: dict[str, str] = Field(default_factory=dict)
    advertise: str = ""

    def address_of(self, interface: str | None) -> str:
        """Where a port listens that asks for this interface. PolicyViolation if the node has none of that name."""
        if interface is None:
            return self.interface
        if interface not in self.interfaces:
            raise _not_allowed(f"ports on the interface {interface!r}", "ports.interfaces", tuple(self.interfaces))
        return self.interfaces[interface]

    @field_validator("interfaces")
    @classmethod
    def _addresses(cls, value: dict[str, str]) -> dict[str, str]:
        for name, address in value.items():
            if not _INTERFACE.fullmatch(name):
                raise ValueError(f"{name!r} is not a name for an interface; it reads like private or lan-2")
            ip_address(address)
        return value

    @field_validator("range", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        first, dash, last = value.partition("-")
        if not dash or not first.strip().isdigit() or not last.strip().isdigit():
            raise ValueError("a range reads like 27000-27999")
        return int(first), int(last)

    @field_validator("range")
    @classmethod
    def _order(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1] <= 65535:
            raise ValueError("two ports from 1 to 65535, the lower one first")
        return value


class NetworkClass(_Section):
    """A network class: the engine's network that it means, and how many of its namespaces are kept warm.

    What containers of the class send to this machine, or to loopback, link-local (cloud metadata) and private addresses
    is refused by the packet filter, unless it goes to one of the ranges in ``allow`` (``private`` stands for all
    private ones) or to a name server: the machine's, or an address in ``dns``. ``guard: false``: no packet filter.
    """

    network: str
    warm: Annotated[int, Field(ge=0, le=64)] = 1
    allow: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    guard: bool = True

    @field_validator("allow")
    @classmethod
    def _ranges(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if each != "private":
                try:
                    ip_network(each)
                except ValueError as error:
                    raise ValueError(f"{error}; a range reads like 10.1.0.0/16, and 'private' means all") from None
        return value

    @field_validator("dns")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            ip_address(each)
        return value

    @property
    def allowed_ranges(self) -> tuple[str, ...]:
        """``allow`` with ``private`` spelled out."""
        return tuple(one for each in self.allow for one in (PRIVATE_RANGES if each == "private" else (each,)))


class ManagedPolicy(_Section):
    """What managed containers may be given beyond the sandbox, by name.

    ``devices``: paths on the host, ``*`` for any part (``/dev/dri/*``). ``private_subnets``: what the networks that
    containers of one object share are cut from, 29 addresses for each.
    """

    capabilities: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    host_network: bool = False
    writable_root: bool = True
    users: tuple[str, ...] = ()  # patterns of "user" or "uid:gid" other than the one allotted
    restart: bool = True
    private_subnets: str = "10.213.0.0/16"

    @field_validator("private_subnets")
    @classmethod
    def _subnets(cls, value: str) -> str:
        network = ipaddress.IPv4Network(value)
        if not network.is_private or network.prefixlen > PRIVATE_PREFIX:
            raise ValueError(f"a private network that is larger than /{PRIVATE_PREFIX} reads like 10.213.0.0/16")
        return value

    @field_validator("capabilities")
    @classmethod
    def _plain(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(capability_name(name) for name in value)


class LimitPolicy(_Section):
    """Limits of one container: what it gets if it asks for nothing, and what it may ask for at most."""

    memory_bytes: Annotated[int, Field(ge=6 * _MIB)] = 1024 * _MIB
    cpus: Annotated[float, Field(gt=0)] = 2.0
    pids: Annotated[int, Field(ge=1)] = 512
    max_memory_bytes: Annotated[int, Field(ge=6 * _MIB)] | None = None
    max_cpus: Annotated[float, Field(gt=0)] | None = None
    max_pids: Annotated[int, Field(ge=1)] | None = None
    step_log_bytes: Annotated[int, Field(ge=_MIB)] = 64 * _MIB
    managed_log_bytes: Annotated[int, Field(ge=_MIB)] = 16 * _MIB
    managed_log_files: Annotated[int, Field(ge=1)] = 4


class NodePolicy(_Section):
    """The whole file. See `load`."""

    images: ImagePolicy = ImagePolicy()
    ports: PortPolicy = PortPolicy()
    networks: dict[str, NetworkClass] = Field(
        default_factory=lambda: {"egress": NetworkClass(network=DEFAULT_NETWORK, warm=1)}
    )
    warm_none: Annotated[int, Field(ge=0, le=64)] = 4  # namespaces kept warm for steps without network
    managed: ManagedPolicy = ManagedPolicy()
    control_foreign: bool = False  # whether containers that Outrider did not start may be stopped and the like
    limits: LimitPolicy = LimitPolicy()
    # What the engine carries steps out with, by its name for it, such as crun or runsc; "": the engine's default.
    oci_runtime: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$")] = AUTO_RUNTIME
    disk_reserve_bytes: Annotated[int, Field(ge=0)] = 1024**3

    @field_validator("networks")
    @classmethod
    def _networks(cls, value: dict[str, NetworkClass]) -> dict[str, NetworkClass]:
        if "none" in value:
            raise ValueError("the class 'none' is always there and means no network")
        for name, network in value.items():
            if network.network == "host" or network.network.startswith("container:"):
                raise ValueError(f"class {name!r}: {network.network!r} is no network of its own")
        names = [network.network for network in value.values()]
        for twice in {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{twice!r} is the network of two classes; give each its own, as it is guarded for one")
        return value

    @classmethod
    def load(cls, path: Path | None) -> NodePolicy:
        """The policy in the YAML file ``path``; the defaults for ``None``. InvalidInput lists every problem."""
        if path is None:
            return cls()
        try:
            document = read_document(path, f"the policy file {path}")
        except FileNotFoundError as error:
            raise InvalidInput(
                f"the policy file {path} does not exist",
                code="file_missing",
                hint="write it, or leave the setting policy_file out for the default policy",
            ) from error
        if document is None:
            return cls()
        if not isinstance(document, dict):
            raise InvalidInput(f"the policy file {path} must be a mapping", hint=f"keys: {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            problems = list(problems_of(error, cls))
            raise InvalidInput(
                f"the policy file {path} is not valid: {'; '.join(map(str, problems))}", problems
            ) from error

    def check_plan(self, plan: StepPlan) -> None:
        """Raises PolicyViolation if this node must not run ``plan``."""
        self.check_image(plan.image)
        self.network_of(plan.network)
        self.limits_for(plan.resources)
        if plan.user is not None and not _STEP_USER.fullmatch(plan.user):
            raise PolicyViolation(
                f"the step asks to run as {plan.user!r}, and steps never run as root",
                hint="leave `user` out, or write it as UID or UID:GID: a name may mean root in its image",
            )

    def check_image(self, image: str) -> None:
        """Raises PolicyViolation if ``image`` is not allowed here."""
        self.images.check(image)

    def network_of(self, network_class: str) -> str:
        """The engine's network of a class; "none" for "none". PolicyViolation if the node has no such class."""
        if network_class == "none":
            return "none"
        found = self.networks.get(network_class)
        if found is None:
            raise PolicyViolation(
                f"this node has no network class {network_class!r}",
                code="network_not_allowed",
                hint=f"it has: {', '.join(['none', *sorted(self.networks)])}",
            )
        return found.network

    def limits_for(self, wanted: Resources) -> Resources:
        """``wanted`` with the node's defaults filled in. PolicyViolation if it is over what the node grants."""
        limits = self.limits
        for what, value, most in (
            ("memory_bytes", wanted.memory_bytes, limits.max_memory_bytes),
            ("cpus", wanted.cpus, limits.max_cpus),
            ("pids", wanted.pids, limits.max_pids),
        ):
            if value is not None and most is not None and value > most:
                raise PolicyViolation(f"{what} of {value} is over this node's limit of {most}", code="over_limit")
        return Resources(
            memory_bytes=wanted.memory_bytes or _at_most(limits.memory_bytes, limits.max_memory_bytes),
            cpus=wanted.cpus or _at_most(limits.cpus, limits.max_cpus),
            pids=wanted.pids or _at_most(limits.pids, limits.max_pids),
        )

    def check_additions(
        self,
        *,
        capabilities: tuple[str, ...],
        devices: tuple[str, ...],
        host_network: bool,
        writable_root: bool,
        user: str | None,
    ) -> None:
        """Raises PolicyViolation unless a managed container may have all of these beyond the sandbox."""
        managed = self.managed
        for name in capabilities:
            if capability_name(name) not in managed.capabilities:
                raise _not_allowed(f"the capability {name}", "managed.capabilities", managed.capabilities)
        for device in devices:
            if not any(fnmatchcase(device, pattern) for pattern in managed.devices):
                raise _not_allowed(f"the device {device}", "managed.devices", managed.devices)
        if host_network and not managed.host_network:
            raise _not_allowed("the host's network", "managed.host_network", ("false",))
        if writable_root and not managed.writable_root:
            raise _not_allowed("a writable root", "managed.writable_root", ("false",))
        if user is not None and not any(fnmatchcase(user, pattern) for pattern in managed.users):
            raise _not_allowed(f"the user {user}", "managed.users", managed.users)


def capability_name(name: str) -> str:
    """The engine's form: upper case, without ``CAP_``."""
    return name.upper().removeprefix("CAP_")


def _at_most(value: Any, most: Any) -> Any:
    return value if most is None else min(value, most)


def _not_allowed(what: str, where: str, allowed: tuple[str, ...]) -> PolicyViolation:
    return PolicyViolation(
        f"this node's policy does not allow {what}", code="not_allowed", hint=f"{where}: {', '.join(allowed) or 'none'}"
    )
