import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxds2.evaluation.breakdown import (
    LENGTHS,
    SECONDS,
    by_duration,
    by_length,
    by_speaker,
    confusions,
    score_utterances,
    worst_first,
)
from jaxds2.evaluation.metrics import count_word_edits

texts = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6).map(" ".join)
corpora = st.lists(
    st.tuples(texts, texts, st.sampled_from(["anna", "ben", None]), st.floats(0, 60)), min_size=1, max_size=8
)


def scored(*rows):
    """Of (ref, hyp, speaker, seconds), named u0, u1, ..."""
    refs, hyps, speakers, seconds = zip(*rows, strict=True)
    return score_utterances([f"u{i}" for i in range(len(rows))], speakers, seconds, refs, hyps)


@given(corpora)
def test_every_breakdown_adds_up_to_the_corpus(rows):
    utterances = scored(*rows)
    total = count_word_edits([ref for ref, *_ in rows], [hyp for _, hyp, *_ in rows])
    for table in (by_speaker(utterances), by_length(utterances), by_duration(utterances)):
        if not table:
            assert all(speaker is None for *_, speaker, _ in rows)
            continue
        assert sum(row["utterances"] for row in table) == len(rows)
        assert sum(row["words"] for row in table) == total.reference
        assert sum(row["insertions"] + row["deletions"] + row["substitutions"] for row in table) == total.errors


@given(corpora)
def test_confusions_hold_every_error(rows):
    found = confusions(scored(*rows))
    total = count_word_edits([ref for ref, *_ in rows], [hyp for _, hyp, *_ in rows])
    assert sum(n for *_, n in found.substitutions) == total.substitutions
    assert sum(n for _, n in found.deletions) == total.deletions
    assert sum(n for _, n in found.insertions) == total.insertions


def test_groups_are_by_their_edges():
    assert LENGTHS[0] == SECONDS[0] == 0
    utterances = scored(("", "x", None, 0.0), ("a b", "a b", None, 1.999), ("a b c", "a", None, 2.0))
    assert [(row["from"], row["to"], row["wer"]) for row in by_length(utterances)] == [
        (0, 0, None),
        (1, 2, 0.0),
        (3, 5, 2 / 3),
    ]
    assert [(row["from"], row["to"], row["utterances"]) for row in by_duration(utterances)] == [(0, 2, 2), (2, 5, 1)]
    long = scored((" ".join(["a"] * 99), "", None, 99.0))
    assert by_length(long)[0]["to"] is by_duration(long)[0]["to"] is None


def test_speakers_are_sorted_the_nameless_last():
    rows = by_speaker(scored(("a", "a", None, 1.0), ("a", "b", "ben", 1.0), ("a", "a", "anna", 1.0)))
    assert [row["speaker"] for row in rows] == ["anna", "ben", None]


def test_the_most_frequent_error_comes_first():
    found = confusions(
        scored(("a b c", "a x c y", "s", 1.0), ("b", "x", "s", 1.0), ("c a", "d a", "s", 1.0), ("a", "", "s", 1.0))
    )
    assert found.substitutions == [("b", "x", 2), ("c", "d", 1)]
    assert found.deletions == [("a", 1)]
    assert found.insertions == [("y", 1)]


def test_the_worst_utterance_has_most_errors_in_fewest_words():
    utterances = scored(
        ("a b c d", "x y c d", None, 1.0), ("a b", "x y", None, 1.0), ("a", "a", None, 1.0), ("a", "", None, 1.0)
    )
    assert [u.id for u in worst_first(utterances)] == ["u1", "u0", "u3", "u2"]


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="longer"):
        score_utterances(["u"], [None, None], [1.0], ["a"], ["a"])
