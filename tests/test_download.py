"""What arrives is what was published, whole; what is unpacked stays inside."""

import hashlib
import io
import os
import random
import re
import socket
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jaxds2.data import download
from jaxds2.data.download import DownloadError, extract, fetch, is_extracted

CONTENT = bytes(range(256)) * 4000
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT as /file; the fields say how badly."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = True
        self.cut_after: list[int] = []
        """Bytes after which each of the next answers breaks off."""
        self.statuses: list[int] = []
        """Status codes of the next answers instead of the file."""
        self.declared: int | None = None
        """A Content-Length that is not true."""
        self.starts: list[int] = []
        """First byte that each request asked for."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        server = self.server
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        server.starts.append(start)
        if self.path != "/file":
            self.answer(404)
        elif server.statuses:
            self.answer(server.statuses.pop(0))
        elif server.ranges and start >= len(CONTENT):
            self.answer(416)
        else:
            self.send(start if server.ranges else 0)

    def send(self, start: int) -> None:
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(self.server.declared or len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut_after.pop(0)] if self.server.cut_after else body)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("checksum", [MD5, SHA256, SHA256.upper().replace("SHA256", "sha256")])
def test_fetch_brings_the_file_and_leaves_no_partial(server: Server, tmp_path: Path, checksum: str) -> None:
    fetch(server.url, tmp_path / "new" / "a.tar.gz", checksum=checksum)
    assert (tmp_path / "new" / "a.tar.gz").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "new") == ["a.tar.gz"]


def test_a_broken_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.cut_after = [300_000, 400_001]
    fetch(server.url, tmp_path / "a", checksum=MD5)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.starts == [0, 300_000, 700_001]


def test_a_transfer_that_breaks_often_but_moves_on_is_not_given_up(server: Server, tmp_path: Path) -> None:
    server.cut_after = [100_000] * (download.TRIES + 2)
    fetch(server.url, tmp_path / "a", checksum=MD5)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_the_next_call_goes_on_from_the_partial_file(server: Server, tmp_path: Path) -> None:
    server.cut_after = [500_000] + [0] * download.TRIES
    with pytest.raises(DownloadError, match=r"gave up after 5 tries .*500000 of 1024000.*500000 bytes are kept"):
        fetch(server.url, tmp_path / "a", checksum=MD5)
    assert not (tmp_path / "a").exists()
    server.cut_after.clear()
    server.starts.clear()
    fetch(server.url, tmp_path / "a", checksum=MD5)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.starts == [500_000]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cut_after = [300_000]
    fetch(server.url, tmp_path / "a", checksum=MD5)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_without_ranges_that_always_breaks_is_given_up(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cut_after = [300_000] * 100
    with pytest.raises(DownloadError, match="gave up after 5 tries"):
        fetch(server.url, tmp_path / "a", checksum=MD5)
    assert len(server.starts) == download.TRIES


def test_a_partial_file_that_is_already_complete_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_bytes(CONTENT)
    fetch(server.url, tmp_path / "a", checksum=MD5)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.starts == [len(CONTENT)]


def test_a_finished_file_is_verified_and_not_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    fetch(server.url, tmp_path / "a", checksum=MD5)
    assert server.starts == []
    (tmp_path / "a").write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(DownloadError, match=rf"a: md5 is \w+, expected {MD5[4:]}; delete "):
        fetch(server.url, tmp_path / "a", checksum=MD5)
    assert server.starts == []
    assert (tmp_path / "a").exists()


def test_a_wrong_checksum_is_refused_and_a_new_call_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_bytes(b"the start of an older edition")
    with pytest.raises(DownloadError, match=rf"sha256 is \w+, expected {SHA256[7:]}; what arrived was deleted"):
        fetch(server.url, tmp_path / "a", checksum=SHA256)
    assert os.listdir(tmp_path) == []
    fetch(server.url, tmp_path / "a", checksum=SHA256)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_missing_file_is_one_line_and_not_tried_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"/nowhere: the server answers 404 Not Found; .*a\.tar\.gz$") as e:
        fetch(server.url.replace("/file", "/nowhere"), tmp_path / "a.tar.gz", checksum=MD5)
    assert "\n" not in str(e.value)
    assert len(server.starts) == 1
    assert os.listdir(tmp_path) == []


def test_an_overloaded_server_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    fetch(server.url, tmp_path / "a", checksum=MD5)
    assert len(server.starts) == 3


def test_no_server_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with socket.socket() as unused:  # bound, but not listening
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
        with pytest.raises(DownloadError, match=r"gave up after 5 tries \(.*refused\); 0 bytes are kept"):
            fetch(url, tmp_path / "a", checksum=MD5)


def test_a_file_larger_than_the_disk_is_refused_before_it_is_fetched(server: Server, tmp_path: Path) -> None:
    server.declared = 2**60
    with pytest.raises(DownloadError, match="not enough disk space"):
        fetch(server.url, tmp_path / "a", checksum=MD5)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.partial").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match=r"a\.partial: cannot be written \(No space left on device\); make room"):
        fetch(server.url, tmp_path / "a", checksum=MD5)
    assert len(server.starts) == 1


# Archives.

FILES = {"corpus/README": b"text", "corpus/wav/a.wav": random.Random(0).randbytes(70_000), "corpus/wav/empty.wav": b""}


def make_tar(path: Path, *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:bz2" if path.name.endswith("bz2") else "w:gz") as tar:
        for name, content in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def make_zip(path: Path, *extra: zipfile.ZipInfo) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        for member in extra:
            archive.writestr(member, b"evil")
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def node(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    return member


def tree(root: Path) -> dict[str, bytes]:
    found = (p for p in root.rglob("*") if p.is_file() and p.suffix != ".extracted")
    return {str(p.relative_to(root)): p.read_bytes() for p in found}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.bz2", "a.zip"])
def test_extract_restores_every_file_and_remembers(tmp_path: Path, name: str) -> None:
    archive, out = (make_zip if name.endswith("zip") else make_tar)(tmp_path / name), tmp_path / "out"
    assert not is_extracted(archive, out)
    extract(archive, out)
    assert tree(out) == FILES
    assert is_extracted(archive, out)
    content = archive.read_bytes()
    archive.unlink()
    assert is_extracted(archive, out)
    archive.write_bytes(content + b"another edition")
    assert not is_extracted(archive, out)


def test_an_extraction_that_fails_forgets_the_one_before(tmp_path: Path) -> None:
    archive, out = make_tar(tmp_path / "a.tar.gz"), tmp_path / "out"
    extract(archive, out)
    content = archive.read_bytes()
    archive.write_bytes(content[:-8] + bytes(8))
    with pytest.raises(DownloadError, match="is damaged"):
        extract(archive, out)
    assert not is_extracted(archive, out)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.bz2", "a.zip"])
@pytest.mark.parametrize("keep", [0, 1, 60, 30_000, -30, -1])  # tarfile alone takes the last two for complete
def test_a_cut_archive_is_an_error_and_a_whole_one_mends_it(tmp_path: Path, name: str, keep: int) -> None:
    archive, out = (make_zip if name.endswith("zip") else make_tar)(tmp_path / name), tmp_path / "out"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:keep])
    with pytest.raises(DownloadError, match=r"a\.\w+.*: is damaged or not complete; delete it"):
        extract(archive, out)
    assert not is_extracted(archive, out)
    archive.write_bytes(whole)
    extract(archive, out)
    assert tree(out) == FILES


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.bz2", "a.zip"])
def test_a_flipped_bit_is_an_error(tmp_path: Path, name: str) -> None:
    archive = (make_zip if name.endswith("zip") else make_tar)(tmp_path / name)
    whole = archive.read_bytes()
    for eighth in range(1, 8):
        content = bytearray(whole)
        content[len(content) * eighth // 8] ^= 4
        archive.write_bytes(content)
        with pytest.raises(DownloadError, match="is damaged"):
            extract(archive, tmp_path / "out")


@pytest.mark.parametrize(
    ("member", "named"),
    [
        (tarfile.TarInfo("../evil"), "'../evil'"),
        (tarfile.TarInfo("corpus/../../evil"), "evil'"),
        (tarfile.TarInfo("corpus/../README"), "'corpus/../README'"),
        (tarfile.TarInfo("{outside}/evil"), "/evil'"),
        (link("corpus/l", "../../evil"), "the link 'corpus/l'"),
        (link("corpus/l", "{outside}"), "the link 'corpus/l'"),
        (link("corpus/l", "../evil", tarfile.LNKTYPE), "the link 'corpus/l'"),
        (link("corpus/l", "{outside}/secret", tarfile.LNKTYPE), "the link 'corpus/l'"),
        (node("corpus/dev", tarfile.CHRTYPE), "'corpus/dev'"),
        (node("corpus/pipe", tarfile.FIFOTYPE), "'corpus/pipe'"),
        (tarfile.TarInfo("planted/evil"), "'planted/evil'"),
    ],
    ids=lambda value: f"{value.name}->{value.linkname}" if isinstance(value, tarfile.TarInfo) else "",
)
def test_a_tar_never_writes_outside(tmp_path: Path, member: tarfile.TarInfo, named: str) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (out / "planted").symlink_to(outside)
    member = member.replace(
        name=member.name.format(outside=outside), linkname=member.linkname.format(outside=outside), deep=False
    )
    archive = make_tar(tmp_path / "a.tar.gz", member)
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(DownloadError, match=r"a\.tar\.gz: refused: .*" + re.escape(named)):
        extract(archive, out)
    assert {p.name for p in tmp_path.iterdir()} == before
    assert tree(outside) == {"secret": b"secret"}
    assert not (out / "corpus/l").is_symlink()
    assert not (out / "corpus/l").exists()
    assert not is_extracted(archive, out)


def test_a_chain_of_links_never_writes_outside(tmp_path: Path) -> None:
    # Each link alone points inside; through the first, the second would lead out.
    chain = [node("d", tarfile.DIRTYPE), link("d/up", "."), link("d/up/up", ".."), tarfile.TarInfo("d/up/up/../evil")]
    with pytest.raises(DownloadError, match="refused"):
        extract(make_tar(tmp_path / "a.tar.gz", *chain), tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_links_inside_are_kept(tmp_path: Path) -> None:
    extra = [link("corpus/also", "README"), link("corpus/same", "corpus/README", tarfile.LNKTYPE)]
    extract(make_tar(tmp_path / "a.tar.gz", *extra), tmp_path / "out")
    assert tree(tmp_path / "out") == FILES | {"corpus/also": b"text", "corpus/same": b"text"}


def symlink_in_zip() -> zipfile.ZipInfo:
    member = zipfile.ZipInfo("corpus/link")
    member.external_attr = 0o120777 << 16
    return member


@pytest.mark.parametrize(
    "member",
    [zipfile.ZipInfo("../evil"), zipfile.ZipInfo("/evil"), zipfile.ZipInfo("planted/evil"), symlink_in_zip()],
    ids=lambda member: member.filename,
)
def test_a_zip_never_writes_outside(tmp_path: Path, member: zipfile.ZipInfo) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (out / "planted").symlink_to(outside)
    with pytest.raises(DownloadError, match=r"a\.zip: refused: .*" + re.escape(repr(member.filename))):
        extract(make_zip(tmp_path / "a.zip", member), out)
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "out", "outside"]
    assert os.listdir(outside) == []
    assert tree(out) == FILES


def test_an_archive_that_cannot_be_unpacked_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"none\.tar\.gz: cannot be unpacked"):
        extract(tmp_path / "none.tar.gz", tmp_path / "out")
    with pytest.raises(DownloadError, match=r"a\.rar: expected a name that ends in"):
        extract(tmp_path / "a.rar", tmp_path / "out")
    (tmp_path / "out" / "corpus").write_text("a file where a folder must stand")
    with pytest.raises(DownloadError, match=r"a\.tar\.gz: cannot be unpacked into"):
        extract(make_tar(tmp_path / "a.tar.gz"), tmp_path / "out")
