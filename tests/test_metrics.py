import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxds2.evaluation.metrics import (
    EditCounts,
    align_words,
    character_edits,
    count_alignment,
    count_character_edits,
    count_word_edits,
)

texts = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6).map(" ".join)
pairs = st.lists(st.tuples(texts, texts), max_size=4)


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


@given(pairs)
def test_errors_are_the_levenshtein_distances_summed(pairs):
    refs, hyps = [r for r, _ in pairs], [h for _, h in pairs]
    assert count_word_edits(refs, hyps).errors == sum(levenshtein(r.split(), h.split()) for r, h in pairs)
    assert count_character_edits(refs, hyps).errors == sum(levenshtein(r, h) for r, h in pairs)


@given(pairs)
def test_reference_is_the_number_of_words_and_of_characters(pairs):
    refs, hyps = [r for r, _ in pairs], [h for _, h in pairs]
    assert count_word_edits(refs, hyps).reference == sum(len(r.split()) for r in refs)
    assert count_character_edits(refs, hyps).reference == sum(len(r) for r in refs)


@given(pairs)
def test_swapping_the_sides_swaps_insertions_and_deletions(pairs):
    refs, hyps = [r for r, _ in pairs], [h for _, h in pairs]
    there, back = count_word_edits(refs, hyps), count_word_edits(hyps, refs)
    assert there.errors == back.errors
    surplus = sum(len(h.split()) - len(r.split()) for r, h in pairs)
    assert there.insertions - there.deletions == surplus == back.deletions - back.insertions


@given(pairs)
def test_counts_of_a_corpus_are_the_sum_of_its_utterances(pairs):
    total = sum((count_word_edits([r], [h]) for r, h in pairs), EditCounts())
    assert total == count_word_edits([r for r, _ in pairs], [h for _, h in pairs])


@given(pairs)
def test_alignment_spells_both_sides_and_has_the_counted_edits(pairs):
    refs, hyps = [r for r, _ in pairs], [h for _, h in pairs]
    alignments = align_words(refs, hyps)
    assert [" ".join(r for r, _ in a if r is not None) for a in alignments] == refs
    assert [" ".join(h for _, h in a if h is not None) for a in alignments] == hyps
    flat = [pair for a in alignments for pair in a]
    insertions, deletions = sum(r is None for r, _ in flat), sum(h is None for _, h in flat)
    substitutions = sum(r != h for r, h in flat) - insertions - deletions
    assert EditCounts(insertions, deletions, substitutions, len(flat) - insertions) == count_word_edits(refs, hyps)


@given(pairs)
def test_counts_of_each_utterance_add_up(pairs):
    refs, hyps = [r for r, _ in pairs], [h for _, h in pairs]
    assert [count_alignment(a) for a in align_words(refs, hyps)] == [count_word_edits([r], [h]) for r, h in pairs]
    assert character_edits(refs, hyps) == [count_character_edits([r], [h]) for r, h in pairs]


def test_of_the_shortest_alignments_that_with_the_fewest_substitutions_is_taken():
    # Two substitutions would do as well.
    assert align_words(["a b"], ["b c"]) == [[("a", None), ("b", "b"), (None, "c")]]
    # Of as many insertions and deletions the insertion is put last, as sclite does.
    assert align_words(["x a b y"], ["x b a y"])[0] == [("x", "x"), ("a", None), ("b", "b"), (None, "a"), ("y", "y")]
    # Not at the price of one more edit: sclite's weights would make 6 edits of these 5.
    assert count_word_edits(["x y z a b"], ["a b c d e"]) == EditCounts(0, 0, 5, 5)


def test_a_long_text_is_aligned_too():
    words = [f"w{i % 97}" for i in range(3000)]
    assert count_word_edits([" ".join(words)], [" ".join(words[10:])]) == EditCounts(0, 10, 0, 3000)


@pytest.mark.parametrize(
    ("ref", "hyp", "expected"),
    [
        ("the cat sat", "the cat sat", EditCounts(0, 0, 0, 3)),
        ("the cat sat", "the bat sat", EditCounts(0, 0, 1, 3)),
        ("the cat sat", "the cat sat down", EditCounts(1, 0, 0, 3)),
        ("the cat sat", "cat sat", EditCounts(0, 1, 0, 3)),
        ("the cat sat", "", EditCounts(0, 3, 0, 3)),
        ("", "the cat", EditCounts(2, 0, 0, 0)),
        ("", "", EditCounts(0, 0, 0, 0)),
        # Case and punctuation are the normaliser's business, not ours.
        ("The cat.", "the cat", EditCounts(0, 0, 2, 2)),
    ],
)
def test_word_edits_of_known_pairs(ref, hyp, expected):
    assert count_word_edits([ref], [hyp]) == expected


def test_spaces_are_characters():
    assert count_character_edits(["to day"], ["today"]) == EditCounts(0, 1, 0, 6)
    assert count_character_edits([" a"], ["a "]).errors == 2


def test_an_empty_reference_adds_its_insertions_to_the_corpus():
    assert count_word_edits(["", "one two"], ["three", "one two"]) == EditCounts(1, 0, 0, 2)


def test_corpus_rate_is_not_the_mean_of_the_rates():
    refs, hyps = ["one", "one two three four five"], ["two", "one two three four five"]
    each = [count_word_edits([r], [h]).rate for r, h in zip(refs, hyps, strict=True)]
    assert sum(each) / 2 == 0.5
    assert count_word_edits(refs, hyps).rate == 1 / 6


def test_rate_without_references():
    assert EditCounts().rate == 0.0
    assert EditCounts(insertions=1).rate == math.inf


def test_line_is_as_icefall_writes_it():
    counts = EditCounts(insertions=393, deletions=280, substitutions=2647, reference=52576)
    assert counts.format("WER") == "%WER 6.31 [3320 / 52576, 393 ins, 280 del, 2647 sub]"


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
        count_word_edits(["a", "b"], ["a"])
