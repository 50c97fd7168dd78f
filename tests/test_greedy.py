import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.decoding.hypothesis import Hypothesis, collapse
from jaxds2.text import Vocabulary

VOCABULARY = Vocabulary("ab ")


def decode(log_probs_UV) -> Hypothesis:
    (best,) = GreedyDecoder(VOCABULARY)(log_probs_UV)
    return best


def spans(log_probs_UV):
    return [(word.text, word.start, word.end) for word in decode(log_probs_UV).words]


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
    assert decode(log_probs_UV).text == "aa b"
    assert decode(log_probs_UV[:0]) == Hypothesis("", (), 0.0, 0.0, 0.0)


def one_hot(path):
    return np.eye(VOCABULARY.size, dtype=np.float32)[path]


def test_a_word_lasts_from_its_first_characters_first_frame_to_its_lasts_last():
    #        0  1  2  3  4  5  6  7  8  9
    path = [0, 1, 1, 0, 2, 0, 3, 0, 1, 1]
    assert spans(one_hot(path)) == [("ab", 1, 5), ("a", 8, 10)]
    assert spans(one_hot([3, 0, 3])) == []
    assert spans(one_hot([1, 0, 1, 3, 0, 3, 2])) == [("aa", 0, 3), ("b", 6, 7)]
    assert spans(np.zeros((0, VOCABULARY.size))) == []


@given(st.lists(st.integers(0, 3), max_size=12))
def test_words_are_those_of_the_text_in_order_and_apart(path):
    words = spans(one_hot(path))
    assert " ".join(word for word, _, _ in words) == decode(one_hot(path)).text
    frames = [frame for _, first, end in words for frame in (first, end)]
    assert frames == sorted(frames)
    assert all(first < end <= len(path) for _, first, end in words)


def test_a_word_is_as_sure_as_its_characters_and_a_path_as_likely_as_its_frames():
    probs_UV = np.array([[0.1, 0.7, 0.2, 0.0], [0.9, 0.1, 0.0, 0.0], [0.2, 0.3, 0.5, 0.0], [0.4, 0.0, 0.0, 0.6]])
    probs_UV[probs_UV == 0] = 1e-9
    best = decode(np.log(probs_UV))
    assert best.text == "ab"
    assert best.words[0].confidence == pytest.approx((0.7 + 0.5) / 2)
    assert best.total == best.acoustic == pytest.approx(np.log(0.7 * 0.9 * 0.5 * 0.6))
    assert best.lm == 0
