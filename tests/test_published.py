"""Published language models arrive as they were, and in the alphabet of our models."""

import gzip
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jaxds2 import cli
from jaxds2.data import download
from jaxds2.data.download import DownloadError
from jaxds2.decoding import published
from jaxds2.decoding.lm import load_unigrams
from jaxds2.decoding.published import download_model

ARPA = """
\\data\\
ngram 1=5
ngram 2=1

\\1-grams:
-1.0\t<UNK>
-99\t<s>\t-0.3
-1.0\t</s>
-0.5\tDON'T\t-0.3
-0.5\tÉCLAIR

\\2-grams:
-0.1\t<s> DON'T

\\end\\
"""
CONTENT = gzip.compress(ARPA.encode(), mtime=0)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch):
    """Paths that a server on this machine was asked for; it serves CONTENT, from where it is asked to."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start:])

        def log_message(self, format, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(published, "SOURCE", f"http://127.0.0.1:{server.server_address[1]}/11/")
        checksum = "md5:" + hashlib.md5(CONTENT).hexdigest()
        monkeypatch.setitem(published.MODELS, "librispeech-3gram", ("3-gram.arpa.gz", checksum))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


def test_a_model_comes_in_lower_case_with_its_words(served, tmp_path: Path):
    (tmp_path / "3-gram.arpa.gz.partial").write_bytes(CONTENT[:20])  # of a try that broke off
    path = download_model("librispeech-3gram", tmp_path, progress=False)
    assert served == ["/11/3-gram.arpa.gz"]
    assert path.read_text(encoding="utf-8") == ARPA.lower()
    assert load_unigrams(path) == ["don't", "éclair"]
    assert (tmp_path / "librispeech-3gram.vocab.txt").read_text(encoding="utf-8") == "don't\néclair\n"


def test_what_is_there_is_not_fetched_again(served, tmp_path: Path, capsys):
    for _ in range(2):
        assert cli.main(["lm", "download", "librispeech-3gram", "--out", str(tmp_path)]) == 0
    assert len(served) == 1
    assert capsys.readouterr().out.count("librispeech-3gram.arpa") == 2


def test_another_file_than_was_published_is_refused(served, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(published.MODELS, "librispeech-3gram", ("3-gram.arpa.gz", "md5:" + "0" * 32))
    with pytest.raises(DownloadError, match="md5 is"):
        download_model("librispeech-3gram", tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_offers_what_is_published():
    assert tuple(published.MODELS) == cli.LANGUAGE_MODELS
