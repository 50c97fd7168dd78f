import subprocess

import pytest
from sctk_files import GOLDEN, read_alignments, read_sum, read_trn, toolkit

from jaxds2.evaluation.metrics import align_words, count_word_edits
from jaxds2.evaluation.sclite import format_ctm, format_stm, format_trn

IDS, SPEAKERS = ["utt 2", "utt1", "1-2-3"], ["anna-b", None, "9 (old)"]
REFS, HYPS = ["the cat sat", "yes", "naïve"], ["the bat sat", "", "naïve café"]


@pytest.mark.parametrize("system", ["a", "b"])
def test_counts_and_alignments_equal_those_of_sclite(system):
    refs, hyps = read_trn(GOLDEN / "ref.trn"), read_trn(GOLDEN / f"{system}.trn")
    ours = count_word_edits(list(refs.values()), [hyps[i] for i in refs])
    theirs = read_sum(GOLDEN / f"{system}.trn.raw")
    assert theirs["utterances"] == len(refs)
    assert (ours.reference, ours.substitutions, ours.deletions, ours.insertions) == tuple(
        theirs[name] for name in ("words", "substitutions", "deletions", "insertions")
    )
    alignments = read_alignments(GOLDEN / f"{system}.trn.sgml")
    assert alignments.keys() == refs.keys()
    assert dict(zip(refs, align_words(list(refs.values()), [hyps[i] for i in refs]), strict=True)) == alignments


@pytest.mark.parametrize("system", ["greedy", "pyctcdecode-default"])
def test_counts_on_the_made_up_set_equal_those_of_sclite(system):
    """That of benchmarks/decoding.py: a third of greedy's words are wrong."""
    refs, hyps = read_trn(GOLDEN / "made-up-ref.trn"), read_trn(GOLDEN / f"made-up-{system}.trn")
    ours = count_word_edits(list(refs.values()), [hyps[i] for i in refs])
    theirs = read_sum(GOLDEN / f"made-up-{system}.trn.raw")
    assert theirs["utterances"] == len(refs) == 300
    assert (ours.reference, ours.substitutions, ours.deletions, ours.insertions) == tuple(
        theirs[name] for name in ("words", "substitutions", "deletions", "insertions")
    )


def test_a_line_of_trn_is_the_text_and_speaker_and_id():
    assert format_trn(IDS, SPEAKERS, REFS).splitlines() == [
        "the cat sat (anna.b-utt%202)",
        "yes (unknown-utt1)",
        "naïve (9%20%28old%29-1-2-3)",
    ]
    assert format_trn(["u"], ["s"], [""]) == "(s-u)\n"


def test_word_times_are_sorted_by_name():
    words = [[("the", 0.5, 0.72)], [], [("naïve", 0.0, 0.3), ("café", 0.3, 1.0)]]
    assert format_ctm(IDS, words) == "1-2-3 A 0.000 0.300 naïve\n1-2-3 A 0.300 0.700 café\nutt%202 A 0.500 0.220 the\n"
    assert format_ctm(["u"], [[("cat", 0.36, 0.6, 0.97)]]) == "u A 0.360 0.240 cat 0.970\n"
    assert format_stm(IDS, SPEAKERS, [1.0, 0.5, 2.25], REFS).splitlines() == [
        "1-2-3 A 9%20%28old%29 0.000 2.250 naïve",
        "utt%202 A anna.b 0.000 1.000 the cat sat",
        "utt1 A unknown 0.000 0.500 yes",
    ]


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        format_trn(IDS, SPEAKERS, REFS[:2])
    with pytest.raises(ValueError, match="shorter"):
        format_ctm(IDS, [[]])


def test_sclite_reads_the_files_and_counts_the_same(tmp_path):
    sclite = toolkit("sclite")
    (tmp_path / "ref.trn").write_text(format_trn(IDS, SPEAKERS, REFS), encoding="utf-8")
    (tmp_path / "hyp.trn").write_text(format_trn(IDS, SPEAKERS, HYPS), encoding="utf-8")
    (tmp_path / "ref.stm").write_text(format_stm(IDS, SPEAKERS, [1.0, 0.5, 2.0], REFS), encoding="utf-8")
    times = [[(w, 0.1 + 0.2 * k, 0.25 + 0.2 * k) for k, w in enumerate(hyp.split())] for hyp in HYPS]
    (tmp_path / "hyp.ctm").write_text(format_ctm(IDS, times), encoding="utf-8")
    common = f"{sclite} -s -e utf-8 -f 0 -o rsum -O ."
    for command in (
        f"{common} -i spu_id -r ref.trn trn -h hyp.trn trn x -n trn",
        f"{common} -r ref.stm stm -h hyp.ctm ctm x -n ctm",
    ):
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, capture_output=True)
    ours = count_word_edits(REFS, HYPS)
    for raw in tmp_path.glob("*.raw"):
        theirs = read_sum(raw)
        assert theirs["utterances"] == 3, raw
        assert (theirs["words"], theirs["errors"]) == (ours.reference, ours.errors), raw
    assert len(list(tmp_path.glob("*.raw"))) == 2
