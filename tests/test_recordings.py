import io
import os
from pathlib import Path

import pytest

from jaxds2.config import ConfigError
from jaxds2.inference.recordings import Recording, check_names, find_recordings


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def find(*arguments, stdin=None):
    with find_recordings([Path(a) for a in arguments], stdin or io.TextIOWrapper(io.BytesIO(b""))) as found:
        return found


def test_a_folder_gives_its_audio_in_sorted_order_under_its_own_names(tmp_path):
    for name in ("b.WAV", "a.flac", "10/z.mp3", "10/a.ogg", "2/y.opus", ".hidden.wav", ".git/x.wav", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    found, faults = find("first.wav", tmp_path / "in", "last.wav")
    assert not faults
    inside = ["a.flac", "b.WAV", "10/a.ogg", "10/z.mp3", "2/y.opus"]
    assert [r.name for r in found] == ["first.wav", *(str(tmp_path / "in" / name) for name in inside), "last.wav"]
    assert [str(r.stem) for r in found] == ["first", "a", "b", "10/a", "10/z", "2/y", "last"]
    (tmp_path / "empty").mkdir()
    assert find(tmp_path / "empty")[0] == []
    assert str(tmp_path / "empty") in find(tmp_path / "empty")[1][0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert "closed: cannot be read (Permission denied)" in find(tmp_path)[1][0]


def test_standard_input_is_kept_while_it_is_needed():
    with find_recordings([Path("-")], io.TextIOWrapper(io.BytesIO(b"RIFF\xff\x00"))) as ((recording,), _):
        assert recording.path.read_bytes() == b"RIFF\xff\x00"
        assert (recording.name, recording.stem) == ("standard input", Path("stdin"))
    assert not recording.path.parent.exists()


def test_standard_input_is_read_once_and_from_no_terminal():
    with pytest.raises(ConfigError, match="twice"):
        find("-", "a.wav", "-")
    with pytest.raises(ConfigError, match="is a terminal"):
        find("-", stdin=Terminal(io.BytesIO()))


def test_two_recordings_never_go_by_one_name():
    paths = [Path("a/x.wav"), Path("b/x.flac"), Path("b/X.flac"), Path("b/y.wav")]
    recordings = [Recording(str(path), path, Path(path.stem)) for path in paths]
    check_names([recordings[0], recordings[3]])
    for other in recordings[1:3]:
        with pytest.raises(ConfigError, match=rf"a/x.wav and {other.name} would both be written to [xX]\.\*"):
            check_names([recordings[0], other])
