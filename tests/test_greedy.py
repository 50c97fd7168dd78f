import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxds2.decoding.greedy import collapse, greedy_decode, greedy_words
from jaxds2.text import Vocabulary

VOCABULARY = Vocabulary("ab ")


@pytest.mark.parametrize(
    ("path", "labels"),
    [
        ([], []),
        ([0, 0], []),
        ([1, 1, 1], [1]),
        ([1, 0, 1], [1, 1]),
        ([0, 1, 1, 0, 0, 1, 2, 2, 0], [1, 1, 2]),
    ],
)
def test_repeats_merge_before_blanks_drop(path, labels):
    assert collapse(path) == labels


@given(st.lists(st.integers(0, 3), max_size=12))
def test_collapse_keeps_the_first_frame_of_each_run_that_is_not_blank(path):
    before = [0, *path]
    assert collapse(path) == [i for previous, i in zip(before, path, strict=False) if i not in (0, previous)]


@given(st.lists(st.integers(1, 3), max_size=6), st.data())
def test_collapse_inverts_every_path_of_a_label(labels, data):
    path = []
    for i, label in enumerate(labels):
        forced = i > 0 and labels[i - 1] == label
        path += [0] * data.draw(st.integers(int(forced), 2)) + [label] * data.draw(st.integers(1, 3))
    assert collapse(np.array([*path, 0], np.int32)) == labels


def test_text_of_a_best_path_has_single_spaces():
    ids_U = [3, 0, 1, 1, 0, 1, 3, 0, 3, 2, 3]
    log_probs_UV = np.log(np.eye(4, dtype=np.float32)[ids_U] * 0.9 + 0.025)
    assert greedy_decode(log_probs_UV, VOCABULARY) == "aa b"
    assert greedy_decode(log_probs_UV[:0], VOCABULARY) == ""


def one_hot(path):
    return np.eye(VOCABULARY.size, dtype=np.float32)[path]


def test_a_word_lasts_from_its_first_characters_first_frame_to_its_lasts_last():
    #        0  1  2  3  4  5  6  7  8  9
    path = [0, 1, 1, 0, 2, 0, 3, 0, 1, 1]
    assert greedy_words(one_hot(path), VOCABULARY) == [("ab", 1, 5), ("a", 8, 10)]
    assert greedy_words(one_hot([3, 0, 3]), VOCABULARY) == []
    assert greedy_words(one_hot([1, 0, 1, 3, 0, 3, 2]), VOCABULARY) == [("aa", 0, 3), ("b", 6, 7)]
    assert greedy_words(np.zeros((0, VOCABULARY.size)), VOCABULARY) == []


@given(st.lists(st.integers(0, 3), max_size=12))
def test_words_are_those_of_the_text_in_order_and_apart(path):
    words = greedy_words(one_hot(path), VOCABULARY)
    assert " ".join(word for word, _, _ in words) == greedy_decode(one_hot(path), VOCABULARY)
    frames = [frame for _, first, end in words for frame in (first, end)]
    assert frames == sorted(frames)
    assert all(first < end <= len(path) for _, first, end in words)
