"""`jaxds2 check` finds no error in the corpora as `jaxds2 prepare` writes them."""

from pathlib import Path

import pytest

from jaxds2 import cli
from jaxds2.data.corpora import prepare_an4, prepare_mini_librispeech
from jaxds2.data.manifest import read_manifest, write_manifest
from jaxds2.data.spoken import prepare_demo


def check(capsys: pytest.CaptureFixture[str], manifests: list[Path]) -> None:
    code = cli.main(["check", *map(str, manifests)])
    assert code == 0, capsys.readouterr().out


def test_an4_has_no_error(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(capsys, prepare_an4(corpora / "an4", tmp_path))


def test_mini_librispeech_has_no_error(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = prepare_mini_librispeech(corpora / "mini_librispeech", tmp_path)
    assert [path.name for path in manifests] == ["train.jsonl", "dev.jsonl"]
    for path, count in zip(manifests, (60, 20), strict=True):  # a sample: all of it takes a minute to decode
        write_manifest(path, read_manifest(path)[:count])
    check(capsys, manifests)


def test_the_demo_corpus_has_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("espeakng_loader")
    prepare_demo(tmp_path, seed=0, workers=1)
    check(capsys, [tmp_path / f"{split}.jsonl" for split in ("train", "dev", "test")])
