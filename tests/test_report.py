import json
import os
import time
from pathlib import Path
from typing import Any, cast

import pytest

from jaxds2.config import Config
from jaxds2.decoding.hypothesis import Decoder
from jaxds2.evaluation.breakdown import score_utterances
from jaxds2.evaluation.logprobs import LogProbs
from jaxds2.evaluation.report import replaced, score_log_probs, score_run, write_report
from jaxds2.files import WriteError
from jaxds2.inference.recognizer import Recognizer
from jaxds2.inference.transcribe import transcribe_run

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
FILES = ["errs.txt", "hyp.trn", "recogs.txt", "ref.stm", "ref.trn", "report.json", "utterances.jsonl"]


def scored(ids=IDS, refs=REFS, hyps=HYPS):
    return score_utterances(ids, ["anna"] * len(ids), [1.5] * len(ids), refs, hyps)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_report_holds_the_corpus_counts(tmp_path):
    report = write_report(tmp_path / "eval" / "x", scored(), **METADATA)
    assert json.loads((tmp_path / "eval" / "x" / "report.json").read_text()) == report
    counts = {"words": 6, "insertions": 1, "deletions": 1, "substitutions": 1}
    assert report == {
        "schema_version": 2,
        "wer": 3 / 6,
        # Drawn three times of three: all may be the right one, or the one with 2 of 3 words (4 of 8 characters) wrong.
        "wer_interval": [0.0, 2 / 3],
        "cer": 9 / 22,
        "cer_interval": [0.0, 4 / 8],
        "intervals": {
            "method": "bootstrap percentiles",
            "level": 0.95,
            "replicates": 10_000,
            "seed": 0,
            "resampled": "utterances",
            "units": 3,
        },
        **counts,
        "characters": 22,
        "character_errors": 9,
        "utterances": 3,
        "utterances_with_errors": 2,
        "word_times": False,
        "breakdown": {
            "speaker": [{"speaker": "anna", "utterances": 3, "seconds": 4.5, **counts, "wer": 0.5}],
            "words": [
                {
                    "from": 1,
                    "to": 2,
                    "utterances": 2,
                    "seconds": 3.0,
                    "words": 3,
                    "insertions": 1,
                    "deletions": 0,
                    "substitutions": 0,
                    "wer": 1 / 3,
                },
                {
                    "from": 3,
                    "to": 5,
                    "utterances": 1,
                    "seconds": 1.5,
                    "words": 3,
                    "insertions": 0,
                    "deletions": 1,
                    "substitutions": 1,
                    "wer": 2 / 3,
                },
            ],
            "seconds": [{"from": 0, "to": 2, "utterances": 3, "seconds": 4.5, **counts, "wer": 0.5}],
        },
        "confusions": {"substitutions": [["sat", "bat", 1]], "deletions": [["cat", 1]], "insertions": [["all", 1]]},
        "worst": [{"id": "utt-b", "errors": 2, "words": 3}, {"id": "utt-c", "errors": 1, "words": 2}],
        **METADATA,
    }


def test_scores_that_others_replace_are_named_by_what_differs(tmp_path):
    assert replaced(tmp_path, {"name": "greedy"}, 700) is None
    beam = {"name": "beam", "alpha": 0.5, "hot_words": {"a": 1.0}, "sources": {"alpha": "default"}}
    metadata: dict[str, Any] = METADATA | {"decoder": beam}
    write_report(tmp_path, scored(), **metadata)
    assert replaced(tmp_path, beam | {"sources": {"alpha": "command line"}}, 700) is None
    os.utime(tmp_path / "report.json", (0, time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1))))
    assert replaced(tmp_path, beam | {"alpha": 1.0}, 900) == (
        f"the scores of 2026-01-02 03:04 in {tmp_path} are replaced (alpha 0.5 -> 1.0, checkpoint step 700 -> 900); "
        f"--name keeps both"
    )
    (tmp_path / "report.json").write_text("{")
    assert replaced(tmp_path, beam, 700) == f"{tmp_path / 'report.json'} cannot be read and is replaced"


def test_recognitions_are_sorted_by_id(tmp_path):
    write_report(tmp_path, scored(), **METADATA)
    assert (tmp_path / "recogs.txt").read_text().splitlines() == [
        "utt-a: ref=yes",
        "utt-a: hyp=yes",
        "utt-b: ref=the cat sat",
        "utt-b: hyp=the bat",
        "utt-c: ref=erase it",
        "utt-c: hyp=erase it all",
    ]


def test_errors_are_marked_and_counted(tmp_path):
    utterances = scored([*IDS, "utt-d"], [*REFS, "a cat a cat a"], [*HYPS, "a bat a rat a"])
    write_report(tmp_path, utterances, **METADATA)
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
    report = write_report(tmp_path, scored(["u"], [""], ["boo"]), **METADATA)
    assert report["wer"] is None
    assert report["wer_interval"] == [None, None]
    assert report["insertions"] == 1
    assert json.loads((tmp_path / "report.json").read_text())["cer"] is None
    assert "u: (*->boo)\n" in (tmp_path / "errs.txt").read_text()


def test_a_rewritten_report_leaves_nothing_else_behind(tmp_path):
    write_report(tmp_path, scored(), **METADATA)
    write_report(tmp_path, scored(hyps=REFS), **METADATA)
    assert names(tmp_path) == FILES
    assert json.loads((tmp_path / "report.json").read_text())["wer"] == 0.0


def test_a_report_that_breaks_off_leaves_the_one_before(tmp_path, monkeypatch):
    write_report(tmp_path, scored(hyps=REFS), **METADATA)
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(WriteError, match="No space"):
        write_report(tmp_path, scored(), **METADATA)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="3 references and 2 hypotheses"):
        scored(hyps=HYPS[:2])
    with pytest.raises(ValueError, match="shorter"):
        score_utterances(IDS, ["anna"], [1.5] * 3, REFS, HYPS)


def test_utterances_are_there_for_programs_and_for_sclite(tmp_path):
    times = {i: [(w, 0.5 * k, 0.5 * k + 0.25) for k, w in enumerate(h.split())] for i, h in zip(IDS, HYPS, strict=True)}
    assert write_report(tmp_path, scored(), times=times, **METADATA)["word_times"] is True
    rows = [json.loads(line) for line in (tmp_path / "utterances.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == sorted(IDS)
    assert rows[1] == {
        "id": "utt-b",
        "speaker": "anna",
        "duration": 1.5,
        "ref": "the cat sat",
        "hyp": "the bat",
        "words": 3,
        "word_errors": 2,
        "characters": 11,
        "character_errors": 5,
    }
    assert (tmp_path / "hyp.trn").read_text().splitlines()[1] == "the bat (anna-utt-b)"
    assert (tmp_path / "ref.trn").read_text().splitlines()[1] == "the cat sat (anna-utt-b)"
    assert (tmp_path / "ref.stm").read_text().splitlines()[1] == "utt-b A anna 0.000 1.500 the cat sat"
    assert (tmp_path / "hyp.ctm").read_text().splitlines()[1:3] == [
        "utt-b A 0.000 0.250 the",
        "utt-b A 0.500 0.250 bat",
    ]


def test_what_this_score_has_not_is_not_left_from_the_one_before(tmp_path):
    write_report(tmp_path, scored(), times={i: [] for i in IDS}, page=lambda report: f"{report['wer']}", **METADATA)
    assert (tmp_path / "report.html").read_text() == "0.5"
    assert names(tmp_path) == sorted([*FILES, "hyp.ctm", "report.html"])
    write_report(tmp_path, scored(), times={IDS[0]: []}, **METADATA)  # not of every utterance
    assert names(tmp_path) == FILES


def test_where_nothing_can_be_written_nothing_is_computed(tmp_path):
    (tmp_path / "file").touch()
    folder, nothing = tmp_path / "file/x", cast(Any, None)  # whatever is touched of it is an AttributeError
    with pytest.raises(WriteError, match="file/x: cannot be written"):
        score_run(cast(Recognizer, nothing), Path("gone.jsonl"), cast(Decoder, nothing), folder=folder)
    saved, config, decoder = cast(LogProbs, nothing), cast(Config, nothing), cast(Decoder, nothing)
    with pytest.raises(WriteError, match="file/x: cannot be written"):
        score_log_probs(saved, tmp_path, config, decoder, manifest=Path("gone"), folder=folder, run_dir=tmp_path)
    with pytest.raises(WriteError, match="file/x: cannot be written"):
        transcribe_run(cast(Recognizer, nothing), [], cast(Decoder, nothing), folder=folder)
