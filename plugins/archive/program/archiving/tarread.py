"""From a tar into a Tree: read once from front to back, by a parser of our own that trusts no number in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from outrider_stepkit import StepFailure

from archiving import tarhead
from archiving.choose import Choice
from archiving.names import shown
from archiving.streams import Incoming, Truncated
from archiving.tarhead import BLOCK, BadHeader, Extensions, Member
from archiving.tree import Tree

_ZEROS = bytes(BLOCK)
_MAX_AFTER_END = 64 * 1024**2
_MAX_EXTENSIONS = 16
_SMALL = 512 * 1024


def read_tar(stream: Incoming, tree: Tree, choice: Choice, on_read: Callable[[], None]) -> None:
    """Unpack the tar ``stream`` to its very end: only there stands the checksum of what is compressed.

    ``on_read`` is called now and then. Raises Truncated, BadHeader, and StepFailure for what is refused.
    """
    for number, member in enumerate(members(stream)):
        _take(stream, member, tree, choice, on_read)
        if number % 64 == 0:
            on_read()
    left = _MAX_AFTER_END
    while data := stream.upto(BLOCK * 128):
        left -= len(data)
        if left < 0:
            raise BadHeader("it goes on long after its end mark")


def members(stream: Incoming) -> Iterator[Member]:
    """The entries. Whoever iterates takes the content of each from ``stream``, padding included, before the next."""
    common = Extensions()  # pax's global header
    more: Extensions | None = None
    extended = 0
    while True:
        view = stream.upto(BLOCK)
        if len(view) < BLOCK:
            raise Truncated("the mark at its end is missing")
        block = bytes(view)
        if block == _ZEROS:
            if more is not None:
                raise Truncated("it ends after an extended header")
            # The mark is two blocks of zeros; GNU tar, too, takes one for the end.
            return
        if not tarhead.checksum_fits(block):
            raise BadHeader("it has something in its middle that is no header of a tar")
        kind = block[156:157]
        if kind in b"xXgLK":
            extended += 1
            if extended > _MAX_EXTENSIONS:
                raise BadHeader("it has a row of extended headers without an entry")
            if kind == b"g":
                tarhead.pax_records(_extension(stream, block), common, is_global=True)
                continue
            more = more or Extensions(records=dict(common.records))
            _extend(_extension(stream, block), kind, more)
            continue
        if kind == b"V":  # the label of a volume
            continue
        if more is None and common.records:
            more = Extensions(records=dict(common.records))
        member = tarhead.parse(block, more)
        if kind == b"S":
            _more_sparse(stream, block, member)
        more, extended = None, 0
        yield member


def _extension(stream: Incoming, block: bytes) -> bytes:
    size = tarhead.number(block[124:136])
    if size > tarhead.MAX_EXTENSION:
        raise BadHeader(f"it has an extended header of {size} bytes")
    data = bytes(stream.exactly(size, "an extended header"))
    stream.skip(-size % BLOCK, "an extended header")
    return data


def _extend(data: bytes, kind: bytes, more: Extensions) -> None:
    if kind == b"L":
        more.name = data.split(b"\0", 1)[0]
    elif kind == b"K":
        more.link = data.split(b"\0", 1)[0]
    else:
        tarhead.pax_records(data, more, is_global=False)


def _more_sparse(stream: Incoming, block: bytes, member: Member) -> None:
    assert member.sparse is not None
    goes_on = block[482]
    while goes_on:
        if len(member.sparse) * 24 > tarhead.MAX_EXTENSION:
            raise BadHeader("it has a file in too many pieces")
        block = bytes(stream.exactly(BLOCK, "the map of a file with holes"))
        member.sparse += tarhead.gnu_sparse(block, 0, 21)
        goes_on = block[504]


def _take(stream: Incoming, member: Member, tree: Tree, choice: Choice, on_read: Callable[[], None]) -> None:
    parts = choice.parts(member.name, backslash=False)
    size = member.size
    if size <= _SMALL and member.kind == tarhead.REGULAR and parts is not None and not member.has_holes:
        # The padding is read along, so that a small file is one piece of the buffer.
        data = stream.exactly(size + -size % BLOCK, member.name)
        tree.put(member.name, parts, member.mode, member.mtime, data[:size])
        return
    if parts is None:
        # Counted all the same: what is decompressed costs time, whether or not it is kept.
        tree.passed_over(size)
        stream.skip(size + -size % BLOCK, member.name)
        return
    match member.kind:
        case tarhead.REGULAR if member.has_holes:
            _sparse_file(stream, member, tree, parts)
        case tarhead.REGULAR:
            with tree.file(member.name, parts, member.mode, member.mtime, size) as sink:
                for piece in stream.pieces(size, member.name):
                    sink.write(piece)
                    on_read()
            stream.skip(-size % BLOCK, member.name)
        case tarhead.DIRECTORY:
            tree.directory(member.name, parts, member.mode, member.mtime)
        case tarhead.SYMLINK:
            tree.symlink(member.name, parts, member.link)
        case tarhead.HARDLINK:
            tree.hard_link(member.name, parts, member.link, choice.stripped(member.link, backslash=False))
        case _:
            raise StepFailure(
                f"the archive is refused: its entry {shown(member.name)} is {member.kind!s}", code="archive_unsafe"
            )


def _sparse_file(stream: Incoming, member: Member, tree: Tree, parts: tuple[str, ...]) -> None:
    size = member.size
    if member.sparse_in_data:
        member.sparse, used = _map_in_data(stream, member)
        size -= used
    places = tarhead.check_sparse(member, size)
    with tree.file(member.name, parts, member.mode, member.mtime, member.real_size) as sink:
        for offset, length in places:
            sink.hole_until(offset)
            for piece in stream.pieces(length, member.name):
                sink.write(piece)
        sink.hole_until(member.real_size)
    stream.skip(-member.size % BLOCK, member.name)


def _map_in_data(stream: Incoming, member: Member) -> tuple[list[tuple[int, int]], int]:
    """The map in front of the content (pax 1.0): decimal lines, the first of which says how many pairs follow."""
    data, used = b"", 0
    wanted = 1
    while True:
        lines = data.split(b"\n")[:-1]
        if lines and wanted == 1:
            wanted = 1 + 2 * int(lines[0]) if lines[0].isdigit() and len(lines[0]) < 8 else 0
            if not 0 < wanted * 2 <= tarhead.MAX_EXTENSION:
                raise BadHeader("it has a file with holes whose map makes no sense")
        if lines and len(lines) >= wanted:
            return tarhead.sparse_map_of(lines[1:wanted]), used
        if used >= min(member.size, tarhead.MAX_EXTENSION):
            raise BadHeader("it has a file with holes whose map makes no sense")
        data += bytes(stream.exactly(BLOCK, member.name))
        used += BLOCK
