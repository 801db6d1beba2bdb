"""The steps ``archive.extract`` and ``archive.create``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator

from outrider.steps import ReadPath, StepContext, StepPlan, StepType, WritePath, hookimpl

outrider_contract = ">=1,<2"
"""The versions of the plugin contract that this works with."""

IMAGE = "outrider/step-archive:0.1.0"

Format = Literal["7z", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst"]
Symlinks = Literal["refuse", "skip", "keep"]

PASSWORD = "ARCHIVE_PASSWORD"  # noqa: S105  (the name of an env)

SUFFIXES: dict[str, Format] = {
    ".7z": "7z",
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar.gz",
    ".tgz": "tar.gz",
    ".tar.bz2": "tar.bz2",
    ".tbz2": "tar.bz2",
    ".tar.xz": "tar.xz",
    ".txz": "tar.xz",
    ".tar.zst": "tar.zst",
    ".tzst": "tar.zst",
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = r"^[0-9]+([.][0-9]+)?(([KMGT]i?)?B)?$"


def parse_size(value: object) -> object:
    """``"5GiB"`` in bytes; whatever is no such text is left for the model to judge."""
    if not isinstance(value, str):
        return value
    if not re.match(_SIZE, value):
        raise ValueError(f"{value!r} is not a size; it reads like 5GiB, 800MB or 1048576")
    number, unit = re.fullmatch(r"([0-9.]+)([KMGTi]*)B?", value).groups()  # type: ignore[union-attr]  # matched above
    return int(float(number) * _UNITS[unit])


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    Field(ge=1),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": _SIZE}]}),
]


Pattern = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^\x00]*[^/\x00]/?$")]
"""As in .gitignore: a path as it stands in the archive, a folder for all that is in it, or, without a slash, a name in
any folder. ``*`` and ``?`` stay within a folder, ``**`` does not."""

_INCLUDE = "take only what one of these patterns fits"
_EXCLUDE = "leave out what one of these patterns fits, also where include takes it"


class ExtractParams(BaseModel):
    """Unpack an archive into a directory. The directory gets all of it or nothing."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, title="archive.extract")

    source: ReadPath = Field(alias="from", description="the archive; of one in volumes the first, which ends in .001")
    to: WritePath = Field(description="the directory that gets what is in the archive; made where it does not exist")
    format: Format | None = Field(None, description="what the archive is; told from its content and name if not given")
    existing: Literal["merge", "replace", "refuse"] = Field(
        "merge",
        description="what happens to a directory `to` that is not empty: merge replaces files of the same name and"
        " keeps the others, replace makes it hold what is in the archive and nothing else, refuse fails",
    )
    include: list[Pattern] = Field(default_factory=list, max_length=256, description=_INCLUDE)
    exclude: list[Pattern] = Field(default_factory=list, max_length=256, description=_EXCLUDE)
    strip_components: int = Field(0, ge=0, le=64, description="how many leading folders of each name to leave out")
    symlinks: Symlinks = Field(
        "refuse",
        description="what happens to symbolic links: refuse fails, skip leaves them out, keep unpacks them. One that"
        " leads out of the directory is refused in any case",
    )
    permissions: Literal["keep", "plain"] = Field(
        "keep",
        description="keep takes the archive's (never set-uid or set-gid bits), plain gives files 0644, executable"
        " ones and directories 0755",
    )
    max_bytes: Size = Field(64 * 2**30, description="what the archive may unpack to")
    max_entries: int = Field(1_000_000, ge=1, description="how many files, directories and links it may have")
    max_depth: int = Field(128, ge=0, le=1000, description="how many folders deep an entry may lie")
    max_ratio: float = Field(
        1000, ge=1, description="how many bytes may come of each byte of the archive; the first 16 MiB are free"
    )


class ExtractOutputs(BaseModel):
    """What was unpacked."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="the directory")
    format: Format
    entries: int = Field(description="files, directories and links")
    files: int
    bytes: int = Field(description="the sum of the files' sizes")
    skipped: int = Field(description="the symbolic links that were left out")


class CreateParams(BaseModel):
    """Pack a directory, or a single file, into an archive. It appears at its path when it is complete."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, title="archive.create")

    source: ReadPath = Field(alias="from", description="a directory, whose content is packed, or one file")
    to: WritePath = Field(description="the archive")
    format: Format | None = Field(None, description="told from the name of `to` if not given")
    level: int | None = Field(
        None,
        ge=0,
        le=19,
        description="0 fast to 9 small; up to 19 for tar.zst. If not given: a fast one that packs well",
    )
    existing: Literal["replace", "refuse"] = Field("replace", description="what happens to a file `to` that exists")
    include: list[Pattern] = Field(default_factory=list, max_length=256, description=_INCLUDE)
    exclude: list[Pattern] = Field(default_factory=list, max_length=256, description=_EXCLUDE)
    symlinks: Symlinks = Field(
        "refuse",
        description="what happens to symbolic links: refuse fails, skip leaves them out, keep packs those that stay"
        " inside and leaves out those that lead out",
    )
    reproducible: bool = Field(
        False,
        description="give every entry the same time, so that the same content with the same permissions makes the same"
        " archive",
    )
    encrypt: bool = Field(
        False,
        description=f"7z and zip: encrypt with AES-256, by the password in the env {PASSWORD}; 7z hides names too",
    )
    volume_size: Size | None = Field(
        None, ge=65536, description="cut the archive into volumes of this size: `to`.001, `to`.002…"
    )

    @model_validator(mode="after")
    def _known_format(self) -> CreateParams:
        chosen = self.format or format_of(self.to)
        if chosen is None:
            known = ", ".join(SUFFIXES)
            raise ValueError(f"to: {self.to!r} does not tell the format: end it in one of {known}, or give format")
        if self.level is not None and self.level > 9 and chosen != "tar.zst":
            raise ValueError(f"level: {self.level} is for tar.zst; the levels of {chosen} are 0 to 9")
        if self.encrypt and chosen not in ("7z", "zip"):
            raise ValueError(f"encrypt: {chosen} knows no encryption; choose 7z or zip")
        if self.encrypt and self.reproducible:
            raise ValueError("reproducible: encryption begins with random bytes, so no two archives are the same")
        return self


class CreateOutputs(BaseModel):
    """What was packed."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="the archive; of one in volumes the first")
    format: Format
    entries: int = Field(description="files, directories and links")
    files: int
    skipped: int = Field(
        description="what is not packed: sockets, devices, pipes, and links that are not to be or lead out"
    )
    source_bytes: int = Field(description="the sum of the files' sizes")
    bytes: int = Field(description="the size of the archive")
    sha256: str = Field(description="the archive's checksum, as s3.upload and others take it; of volumes, in a row")
    volumes: int = Field(description="how many files the archive is")


def format_of(name: str) -> Format | None:
    """The format that a file's name says, if any."""
    lower = name.lower()
    return next(
        (SUFFIXES[suffix] for suffix in sorted(SUFFIXES, key=len, reverse=True) if lower.endswith(suffix)), None
    )


def _plan(command: str, params: BaseModel, **more: Any) -> StepPlan:
    inputs = {**params.model_dump(by_alias=True), **more}
    return StepPlan(image=IMAGE, args=(command,), network="none", inputs=inputs)


def resolve_extract(params: ExtractParams, context: StepContext) -> StepPlan:
    """The format stays open if it is not given: only the program sees the archive's content."""
    return _plan("extract", params)


def resolve_create(params: CreateParams, context: StepContext) -> StepPlan:
    if params.encrypt and PASSWORD not in context.envs:
        raise ValueError(f"encrypt: the step needs the password as the env {PASSWORD}: name it in the step's envs")
    return _plan("create", params, format=params.format or format_of(params.to))


@hookimpl
def outrider_step_types() -> list[StepType]:
    return [
        StepType(
            name="archive.extract",
            params=ExtractParams,
            outputs=ExtractOutputs,
            resolve=resolve_extract,
            envs=[PASSWORD],
            idempotent=True,
            description="Unpack 7z, zip, tar and tar.gz, .bz2, .xz or .zst into a directory, all of it or nothing",
        ),
        StepType(
            name="archive.create",
            params=CreateParams,
            outputs=CreateOutputs,
            resolve=resolve_create,
            envs=[PASSWORD],
            idempotent=True,
            description="Pack a directory or a file into 7z, zip, tar or tar.gz, .bz2, .xz or .zst",
        ),
    ]
