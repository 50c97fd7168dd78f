import json

import pytest

from jaxds2.evaluation.report import write_report
from jaxds2.files import WriteError

METADATA = {
    "rtfx": 12.5,
    "manifest": "data/an4/test.jsonl",
    "manifest_sha256": "ab" * 32,
    "checkpoint": "best",
    "checkpoint_step": 700,
    "decoder": {"name": "greedy"},
}
IDS = ["utt-b", "utt-c", "utt-a"]
REFS = ["the cat sat", "erase it", "yes"]
HYPS = ["the bat", "erase it all", "yes"]


def test_report_holds_the_corpus_counts(tmp_path):
    report = write_report(tmp_path / "eval" / "x", ids=IDS, refs=REFS, hyps=HYPS, **METADATA)
    assert json.loads((tmp_path / "eval" / "x" / "report.json").read_text()) == report
    assert report == {
        "schema_version": 1,
        "wer": 3 / 6,
        "cer": 9 / 22,
        "words": 6,
        "insertions": 1,
        "deletions": 1,
        "substitutions": 1,
        "characters": 22,
        "character_errors": 9,
        "utterances": 3,
        **METADATA,
    }


def test_recognitions_are_sorted_by_id(tmp_path):
    write_report(tmp_path, ids=IDS, refs=REFS, hyps=HYPS, **METADATA)
    assert (tmp_path / "recogs.txt").read_text().splitlines() == [
        "utt-a: ref=yes",
        "utt-a: hyp=yes",
        "utt-b: ref=the cat sat",
        "utt-b: hyp=the bat",
        "utt-c: ref=erase it",
        "utt-c: hyp=erase it all",
    ]


def test_errors_are_marked_and_counted(tmp_path):
    write_report(
        tmp_path,
        ids=[*IDS, "utt-d"],
        refs=[*REFS, "a cat a cat a"],
        hyps=[*HYPS, "a bat a rat a"],
        **METADATA,
    )
    assert (tmp_path / "errs.txt").read_text() == (
        "%WER 45.45 [5 / 11, 1 ins, 1 del, 3 sub]\n"
        "%CER 31.43 [11 / 35, 4 ins, 4 del, 3 sub]\n"
        "3 of 4 utterances with errors\n"
        "\n"
        "UTTERANCES: (ref->hyp) substituted, (ref->*) deleted, (*->hyp) inserted\n"
        "utt-a: yes\n"
        "utt-b: the (cat->*) (sat->bat)\n"
        "utt-c: erase it (*->all)\n"
        "utt-d: a (cat->bat) a (cat->rat) a\n"
        "\n"
        "SUBSTITUTIONS: count ref -> hyp\n"
        "1 cat -> bat\n"
        "1 cat -> rat\n"
        "1 sat -> bat\n"
        "\n"
        "DELETIONS: count ref\n"
        "1 cat\n"
        "\n"
        "INSERTIONS: count hyp\n"
        "1 all\n"
    )


def test_errors_against_no_reference_leave_valid_json(tmp_path):
    report = write_report(tmp_path, ids=["u"], refs=[""], hyps=["boo"], **METADATA)
    assert report["wer"] is None
    assert report["insertions"] == 1
    assert json.loads((tmp_path / "report.json").read_text())["cer"] is None
    assert "u: (*->boo)\n" in (tmp_path / "errs.txt").read_text()


def test_a_rewritten_report_leaves_nothing_else_behind(tmp_path):
    write_report(tmp_path, ids=IDS, refs=REFS, hyps=HYPS, **METADATA)
    write_report(tmp_path, ids=IDS, refs=REFS, hyps=REFS, **METADATA)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["errs.txt", "recogs.txt", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["wer"] == 0.0


def test_a_report_that_breaks_off_leaves_the_one_before(tmp_path, monkeypatch):
    write_report(tmp_path, ids=IDS, refs=REFS, hyps=REFS, **METADATA)
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(WriteError, match="No space"):
        write_report(tmp_path, ids=IDS, refs=REFS, hyps=HYPS, **METADATA)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


def test_unequal_numbers_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_report(tmp_path / "x", ids=IDS, refs=REFS, hyps=HYPS[:2], **METADATA)
    assert not (tmp_path / "x").exists()
