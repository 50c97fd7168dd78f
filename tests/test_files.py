"""A file is written whole or not at all, and a refusal is one line that names it."""

import contextlib
import errno
import os
import resource
from pathlib import Path

import pytest

from jaxds2.files import WriteError, check_writable, replacing, write_whole


def refusal(path: Path, data: str | bytes = "new") -> str:
    with pytest.raises(WriteError) as caught:
        write_whole(path, data)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: cannot be written (")
    return message


@pytest.mark.parametrize(("data", "content"), [("é\n", "é\n".encode()), (b"\x00\r\n", b"\x00\r\n"), ("", b"")])
def test_text_and_bytes_are_written_as_they_are_in_folders_that_are_made(
    tmp_path: Path, data: str | bytes, content: bytes
):
    path = tmp_path / "a/b/file.txt"
    for _ in range(2):
        write_whole(path, data)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file.txt"]


def test_without_room_the_old_content_stays_and_the_remedy_is_named(tmp_path: Path):
    path = tmp_path / "file.txt"
    write_whole(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = refusal(path, b"x" * 100_001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.endswith("(File too large); make room, then run the same command again")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "; make room, then run the same command again"),
        (errno.EDQUOT, "; make room, then run the same command again"),
        (errno.EIO, ""),
    ],
)
def test_room_is_asked_for_only_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
):
    path = tmp_path / "file.txt"
    write_whole(path, "old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.replace", fail)
    assert refusal(path) == f"{path}: cannot be written ({os.strerror(number)}){remedy}"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_an_interrupt_passes_through_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file.txt", "new")
    assert os.listdir(tmp_path) == []


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path):
    path = tmp_path / "file.txt"
    with replacing(path) as partial:
        partial.write_text("old")
        assert not path.exists()
    block = replacing(path)
    block.__enter__().write_text("new")
    assert not block.__exit__(KeyError, KeyError(), None)
    with pytest.raises(WriteError) as caught, replacing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value).endswith("(No space left on device); make room, then run the same command again")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_what_is_durable_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_block_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, done = tmp_path / "file.txt", []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        done.append("named")
        replace(source, target)

    monkeypatch.setattr("os.fsync", record_fsync)
    monkeypatch.setattr("os.replace", record_replace)
    write_whole(path, "new", durable=True)
    assert done == [path.stat().st_ino, "named", tmp_path.stat().st_ino]


@pytest.mark.parametrize(("number", "refused"), [(errno.EIO, True), (errno.EINVAL, False), (errno.ENOTSUP, False)])
def test_a_disk_that_fails_is_an_error_and_a_file_system_that_cannot_say_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, refused: bool
):
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file.txt"
    write_whole(path, "old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(WriteError, match=os.strerror(number)) if refused else contextlib.nullcontext():
        write_whole(path, "new", durable=True)
    assert path.read_text() == ("old" if refused else "new")
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_file_in_place_of_a_folder_and_a_folder_in_place_of_the_file_are_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert "(Not a directory)" in refusal(tmp_path / "file/new.txt")
    assert "(Not a directory)" in refusal(tmp_path / "file/deeper/new.txt")
    assert "(Is a directory)" in refusal(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_whether_a_folder_can_be_written_is_found_out_without_a_trace(tmp_path: Path):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "not/there"):
        check_writable(folder)
    for folder in (tmp_path / "file", tmp_path / "file/deeper"):
        with pytest.raises(WriteError, match=rf"^{folder}: cannot be written \(Not a directory\)$"):
            check_writable(folder)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        assert "(Permission denied)" in refusal(tmp_path / "file.txt")
    finally:
        tmp_path.chmod(0o700)
