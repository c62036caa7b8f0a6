"""Trees of the host as a guest sees them: as they are, read when they are first used, and never changed."""

from __future__ import annotations

import io
import os
import socket
import stat
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from both import Ours, contents, outcome, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.linux.contents import Regular
from workers.linux.directories import Directory
from workers.linux.frames import NoFrames
from workers.linux.inodes import Inode, Symlink
from workers.linux.sources import Entry, HostTree, Source, TarTree
from workers.linux.space import PAGE
from workers.linux.vfs import FileSystem

LARGE = 40 * PAGE + 5       # more than is read at once


@dataclass
class Seen:
    """What a source was asked for."""

    source: Source
    asked: list[tuple[str, bytes]] = field(default_factory=list)

    def list(self, path: bytes) -> list[Entry]:
        self.asked.append(("list", path))
        return self.source.list(path)

    def read(self, path: bytes, offset: int, count: int) -> bytes:
        self.asked.append(("read", path))
        return self.source.read(path, offset, count)

    def readlink(self, path: bytes) -> bytes:
        self.asked.append(("readlink", path))
        return self.source.readlink(path)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Something of each kind."""
    found = tmp_path / "top"
    (found / "bin" / "below").mkdir(parents=True)
    (found / "empty").mkdir(mode=0o700)
    (found / "bin" / "tool").write_bytes(b"#!/bin/sh\n")
    (found / "bin" / "tool").chmod(0o4755)
    (found / "bin" / "large").write_bytes(bytes(at // PAGE % 250 + 1 for at in range(LARGE)))
    (found / "bin" / "below" / "same").hardlink_to(found / "bin" / "tool")
    (found / "nothing").write_bytes(b"")
    (found / "link").symlink_to("bin/tool")
    (found / "absolute").symlink_to("/bin/large")
    (found / "out").symlink_to("../outside")
    os.mkdir(os.fsencode(found) + b"/n\xff\xfem")
    os.mkfifo(found / "fifo", 0o622)
    (tmp_path / "outside").write_bytes(b"secret")
    for path, moment in ((found / "bin" / "tool", 10**18 + 7), (found / "link", 5)):
        os.utime(path, ns=(moment, moment), follow_symlinks=False)
    return found


@pytest.fixture(params=["directory", "tar", "tar.gz"])
def source(top: Path, request: pytest.FixtureRequest) -> Iterator[Source]:
    if request.param == "directory":
        with closing(HostTree(top)) as found:
            yield found
        return
    path = top.parent / request.param
    with tarfile.open(path, "w:gz" if request.param == "tar.gz" else "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(top, arcname=".")
    with closing(TarTree(path)) as tree_of_tar:
        yield tree_of_tar


@dataclass
class Imported:
    """A file system whose root is what a source has."""

    source: Source
    pages: int = 200

    def __post_init__(self) -> None:
        self.ours = Ours(self.pages)
        self.seen = Seen(self.source)
        self.fs.attach("image", self.seen)
        self.fs.import_tree(self.fs.root, "image")

    @property
    def fs(self) -> FileSystem:
        return self.ours.fs

    def find(self, path: bytes, *, follow: bool = True) -> Inode:
        return self.fs.find(self.fs.root, path, follow=follow)

    def file(self, path: bytes) -> Regular:
        found = self.find(path)
        assert isinstance(found, Regular)
        return found

    def bytes_of(self, path: bytes) -> bytes:
        found = self.file(path)
        return found.read(0, found.size)


def on_host(path: Path) -> dict[bytes, tuple[object, ...]]:
    """Beneath it: what a guest should see."""
    found: dict[bytes, tuple[object, ...]] = {}
    for where, directories, files in os.walk(os.fsencode(path)):
        for name in [*directories, *files]:
            each = os.path.join(where, name)
            status = os.lstat(each)
            kept: bytes | int = os.readlink(each) if stat.S_ISLNK(status.st_mode) else 0
            if stat.S_ISREG(status.st_mode):
                kept = Path(os.fsdecode(each)).read_bytes()
            directory = stat.S_ISDIR(status.st_mode)
            found[each[len(os.fsencode(path)):]] = (
                oct(status.st_mode), status.st_uid, status.st_gid, 0 if directory else status.st_size,
                status.st_mtime_ns // 10**9, 0 if directory else status.st_nlink, kept)
    return found


def as_guest(fs: FileSystem) -> dict[bytes, tuple[object, ...]]:
    found: dict[bytes, tuple[object, ...]] = {}
    for path, inode in dict(tree(fs.root)).items():
        kept: bytes | int = inode.target if isinstance(inode, Symlink) else 0
        if isinstance(inode, Regular):
            kept = inode.read(0, inode.size)
        status = inode.stat()
        directory = isinstance(inode, Directory)
        found[path] = (oct(status.mode), status.uid, status.gid, 0 if directory else status.size,
                       status.mtime // 10**9, 0 if directory else status.nlink, kept)
    del found[b"/"]
    return found


def test_everything_is_there(top: Path, source: Source) -> None:
    imported = Imported(source)
    assert as_guest(imported.fs) == on_host(top)
    imported.ours.check()


def test_what_is_changed_stays_in_memory(top: Path, source: Source) -> None:
    before = on_host(top)
    imported = Imported(source)
    fs, root = imported.fs, imported.fs.root
    fs.open(root, b"bin/tool", os.O_RDWR | os.O_APPEND).write(b"exit 1\n")
    fs.open(root, b"bin/large", os.O_RDWR | os.O_TRUNC)
    fs.rename(root, b"bin", root, b"moved")
    fs.unlink(root, b"link")
    fs.rmdir(root, b"empty")
    fs.mkdir(root, b"moved/below/new", 0o755)
    fs.chmod(imported.find(b"nothing"), 0o600)
    assert imported.bytes_of(b"moved/below/same") == b"#!/bin/sh\nexit 1\n"
    assert imported.file(b"moved/large").size == 0
    assert on_host(top) == before
    imported.ours.check()


def test_it_is_read_at_first_use(source: Source) -> None:
    imported = Imported(source)
    seen = imported.seen.asked
    assert seen == []
    imported.find(b"bin")
    assert seen == [("list", b"")]
    assert imported.find(b"bin/large").stat().size == LARGE
    assert seen[1:] == [("list", b"bin")]
    assert imported.find(b"link", follow=False).stat().size == len("bin/tool")
    assert imported.find(b"link") is imported.find(b"bin/tool")
    imported.find(b"link")
    assert seen[2:] == [("readlink", b"link")]
    large = imported.file(b"bin/large")
    assert (large.blocks, imported.ours.frames.free) == (41, imported.pages)
    assert large.read(5 * PAGE, 1) == b"\6"
    assert imported.ours.frames.free == imported.pages - 32
    assert large.read(0, 20 * PAGE) == b"".join(bytes([at + 1]) * PAGE for at in range(20))
    assert seen[3:] == [("read", b"bin/large")]
    assert imported.ours.ram.of(large.frame(40))[:6] == b"\51" * 5 + b"\0"
    assert seen[4:] == [("read", b"bin/large")]
    assert large.blocks == 41
    imported.ours.check()


writes = st.one_of(
    st.tuples(st.just("read"), st.integers(0, LARGE), st.integers(0, 5 * PAGE)),
    st.tuples(st.just("write"), st.integers(0, LARGE + PAGE), st.integers(1, 3 * PAGE)),
    st.tuples(st.just("punch"), st.integers(0, LARGE), st.integers(1, 5 * PAGE)),
    st.tuples(st.just("resize"), st.integers(0, LARGE + 3 * PAGE), st.just(0)),
    st.tuples(st.just("allocate"), st.integers(0, LARGE), st.integers(1, 5 * PAGE)),
    st.tuples(st.just("frame"), st.integers(0, LARGE), st.just(0)),
    st.tuples(st.just("reload"), st.just(0), st.just(0)))


@dataclass
class Constant:
    """A source with one large file."""

    contents: bytes = bytes(at // PAGE % 250 + 1 for at in range(LARGE))

    def list(self, path: bytes) -> list[Entry]:
        return [Entry(b"a", stat.S_IFREG | 0o644, len(self.contents))]

    def read(self, path: bytes, offset: int, count: int) -> bytes:
        return self.contents[offset:offset + count]

    def readlink(self, path: bytes) -> bytes:
        raise NotImplementedError


@settings(max_examples=int(os.environ.get("EXAMPLES", "80")))
@given(st.lists(writes, max_size=15), st.sampled_from([200, 160, 60]))
def test_it_does_not_matter_when_it_is_read(actions: list[tuple[str, int, int]], pages: int) -> None:
    """Contents are as if all had been read at once, whatever memory there is."""
    imported = Imported(Constant(), pages)
    fs = imported.fs
    file = fs.open(fs.root, b"a", os.O_RDWR)
    expected = bytearray(Constant().contents)
    for value, (name, offset, count) in enumerate(actions):
        end = offset + count
        try:
            if name == "read":
                assert file.pread(count, offset) == expected[offset:end]
            elif name == "write":
                end = offset + file.pwrite(bytes([value + 1]) * count, offset)
                expected.extend(bytes(max(0, end - len(expected))))
                expected[offset:end] = bytes([value + 1]) * (end - offset)
            elif name == "punch":
                file.allocate(3, offset, count)
                inside = min(end, len(expected))
                expected[offset:inside] = bytes(max(0, inside - offset))
            elif name == "resize":
                file.resize(offset)
                expected.extend(bytes(max(0, offset - len(expected))))
                del expected[offset:]
            elif name == "allocate":
                file.allocate(0, offset, count)
                expected.extend(bytes(max(0, end - len(expected))))
            elif name == "frame" and offset < len(expected):
                assert isinstance(file.inode, Regular)
                page = offset // PAGE
                mapped = bytes(imported.ours.ram.of(file.inode.frame(page)))
                assert mapped == expected[page * PAGE:(page + 1) * PAGE].ljust(PAGE, b"\0")
            elif name == "reload":
                (file,) = imported.ours.reload([file])
        except OSError as error:
            assert os.strerror(error.errno or 0) == "No space left on device"       # noqa: PT017
        except NoFrames:
            assert imported.ours.frames.free == 0
    assert file.pread(10**9, 0) == expected
    imported.ours.check()
    fs = imported.fs
    fs.unlink(fs.root, b"a")
    file.let_go()
    assert imported.ours.frames.free == pages
    imported.ours.check()


def test_a_saved_file_system_goes_on_reading(top: Path, source: Source) -> None:
    imported = Imported(source)
    imported.find(b"bin/tool")
    imported.bytes_of(b"link")
    imported.ours.reload([])
    assert imported.bytes_of(b"bin/below/same") == b"#!/bin/sh\n"
    assert imported.find(b"bin/below/same") is imported.find(b"bin/tool")
    assert as_guest(imported.fs) == on_host(top)
    imported.ours.check()


def test_reading_needs_no_memory(source: Source) -> None:
    imported = Imported(source, pages=2)
    assert imported.bytes_of(b"bin/large") == bytes(at // PAGE % 250 + 1 for at in range(LARGE))
    assert imported.ours.frames.free == 0
    assert imported.bytes_of(b"bin/tool") == b"#!/bin/sh\n"
    file = imported.fs.open(imported.fs.root, b"bin/tool", os.O_RDWR)
    assert outcome(lambda: file.write(b"!")) == "No space left on device"
    assert file.pread(100, 0) == b"#!/bin/sh\n"
    assert outcome(lambda: file.allocate(3, 2, 3)) == "No space left on device"
    imported.ours.check()


def test_a_source_that_fails_is_an_input_error(top: Path) -> None:
    with closing(HostTree(top)) as source:
        imported = Imported(source)
        imported.find(b"bin/below/same")
        before = (top / "bin" / "large").read_bytes()
        (top / "bin" / "large").write_bytes(before[:10 * PAGE])
        assert outcome(lambda: imported.bytes_of(b"bin/large")) == "Input/output error"
        with pytest.raises(IndexError):
            imported.file(b"bin/large").frame(20)
        file = imported.fs.open(imported.fs.root, b"bin/large", os.O_RDWR)
        assert outcome(lambda: file.pwrite(b"1", 20 * PAGE + 1)) == "Input/output error"
        imported.ours.check()
        (top / "bin" / "large").write_bytes(before)
        assert imported.bytes_of(b"bin/large") == before
        (top / "bin" / "below" / "same").unlink()
        (top / "bin" / "tool").unlink()
        (top / "empty").rmdir()
        (top / "link").unlink()
        for call in (lambda: imported.bytes_of(b"bin/tool"), lambda: imported.find(b"empty/x"),
                     lambda: imported.find(b"empty").stat(), lambda: imported.find(b"link")):
            assert outcome(call) == "Input/output error"
        imported.fs.store.sources.clear()
        assert outcome(lambda: imported.find(b"empty/x")) == "Input/output error"


def test_nothing_outside_is_reached(top: Path) -> None:
    with closing(HostTree(top)) as source:
        for path in (b"../outside", b"/etc/passwd", b"bin/../../outside"):
            assert outcome(lambda path=path: source.read(path, 0, 9)) == "Invalid cross-device link"   # type: ignore[misc]
        assert outcome(lambda: source.read(b"out", 0, 9)) == "Too many levels of symbolic links"
        imported = Imported(source)
        assert outcome(lambda: imported.find(b"out")) == "No such file or directory"
        imported.find(b"bin/tool")
        imported.find(b"bin/below")
        (top / "bin" / "below" / "same").unlink()
        (top / "bin" / "below").rmdir()
        (top / "bin" / "below").symlink_to(top.parent)
        assert outcome(lambda: imported.find(b"bin/below/outside")) == "Input/output error"
        (top / "bin").rename(top / "old")
        (top / "bin").symlink_to(top.parent)
        assert outcome(lambda: source.read(b"bin/outside", 0, 9)) == "Invalid cross-device link"
        (top / "bin").unlink()
        (top / "bin").symlink_to("/proc/self/root")
        assert outcome(lambda: source.list(b"bin/etc")) == "Invalid cross-device link"


def test_a_fifo_that_took_a_file_s_place_is_not_waited_for(top: Path) -> None:
    with closing(HostTree(top)) as source:
        imported = Imported(source)
        imported.find(b"bin/tool")
        (top / "bin" / "tool").unlink()
        os.mkfifo(top / "bin" / "tool")
        assert outcome(lambda: imported.bytes_of(b"bin/tool")) == "Input/output error"


@pytest.mark.root
def test_nodes_are_imported_without_what_is_behind_them(top: Path) -> None:
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "disk", stat.S_IFBLK | 0o660, os.makedev(8, 17))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fsencode(top / "socket"))
    with tarfile.open(top.parent / "tar", "w") as tar:
        tar.add(top, arcname=".")
    with closing(HostTree(top)) as directory, closing(TarTree(top.parent / "tar")) as archive:
        for source, names in ((directory, [b"null", b"disk", b"fifo", b"socket"]),
                              (archive, [b"null", b"disk", b"fifo"])):
            imported = Imported(source)
            for name in names:
                found, expected = imported.find(name).stat(), os.stat(os.fsencode(top) + b"/" + name)
                assert (found.mode, found.rdev, found.size) == (expected.st_mode, expected.st_rdev, 0)
            assert imported.fs.open(imported.fs.root, b"null", os.O_RDWR).write(b"123") == 3
            assert not [path for what, path in imported.seen.asked if what == "read"]


def test_only_an_empty_directory_is_imported_into(top: Path) -> None:
    with closing(HostTree(top)) as source:
        imported = Imported(source)
        fs = imported.fs
        fs.mkdir(fs.root, b"bin/here", 0o755)
        here = imported.find(b"bin/here")
        assert isinstance(here, Directory)
        fs.import_tree(here, "image", b"bin/below")
        assert imported.find(b"bin/here/same") is imported.find(b"bin/tool")
        assert outcome(lambda: fs.import_tree(fs.root, "image")) == "Directory not empty"


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "",
           data: bytes = b"") -> tuple[tarfile.TarInfo, bytes]:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.size, found.mode, found.mtime = kind, link, len(data), 0o640, 7
    return found, data


def test_members_of_a_tar_file(tmp_path: Path) -> None:
    """In any order, under any name, more than once; those that lead outside are left out."""
    with tarfile.open(tmp_path / "tar", "w") as tar:
        for info, data in (
                member("/a/b/file", data=b"1"), member("./a", tarfile.DIRTYPE), member("../outside", data=b"2"),
                member("a/../../outside", data=b"2"), member("hard", tarfile.LNKTYPE, "a/b/file"),
                member("harder", tarfile.LNKTYPE, "./hard"), member("lost", tarfile.LNKTYPE, "../outside"),
                member("directory", tarfile.DIRTYPE), member("directory/x", data=b"3"), member("directory", data=b"4"),
                member("twice", data=b"5"), member("twice", data=b"66"), member("link", tarfile.SYMTYPE, "a/b/file"),
                member("becomes", data=b"7"), member("becomes", tarfile.DIRTYPE), member("becomes/y", data=b"8"),
                member("again", tarfile.DIRTYPE), member("again/z/z", data=b"9"), member("again", data=b"9"),
                member("again/z", tarfile.DIRTYPE)):
            tar.addfile(info, io.BytesIO(data))
    with closing(TarTree(tmp_path / "tar")) as source:
        imported = Imported(source)
        found = {path: inode.read(0, inode.size) if isinstance(inode, Regular) else contents(inode)
                 for path, inode in tree(imported.fs.root)}
        assert found == {
            b"/": (), b"/a": (), b"/a/b": (), b"/a/b/file": b"1", b"/hard": b"1", b"/harder": b"1", b"/directory": b"4",
            b"/twice": b"66", b"/link": (b"a/b/file",), b"/becomes": (), b"/becomes/y": b"8",
            b"/again": (), b"/again/z": ()}
        assert imported.find(b"hard") is imported.find(b"a/b/file") is imported.find(b"harder")
        assert (imported.find(b"hard").nlink, oct(imported.find(b"a").mode)) == (3, "0o40640")
        assert oct(imported.find(b"a/b").mode) == "0o40755"


def test_an_entry_s_times_are_kept(top: Path) -> None:
    with closing(HostTree(top)) as source:
        found = Imported(source).find(b"bin/tool").stat()
    expected = os.stat(top / "bin" / "tool")
    assert (found.atime, found.mtime, found.ctime) == (expected.st_atime_ns, expected.st_mtime_ns, expected.st_ctime_ns)
