import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxds2.decoding.hypothesis import DecoderError, best_path, check_log_probs, collapse, path_words
from jaxds2.text import Vocabulary

VOCABULARY = Vocabulary("ab ")


def log_softmax(logits_UV):
    return logits_UV - np.log(np.exp(logits_UV).sum(-1, keepdims=True))


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 5))
def test_the_best_path_is_the_one_that_brute_force_finds(seed, labels, num_frames):
    log_probs_UV = log_softmax(np.random.default_rng(seed).normal(size=(num_frames, VOCABULARY.size)) * 2)
    paths = [p for p in itertools.product(range(VOCABULARY.size), repeat=num_frames) if collapse(p) == labels]
    if not paths:
        with pytest.raises(ValueError, match=f"{num_frames} frames cannot hold {len(labels)} labels"):
            best_path(log_probs_UV, labels)
        return
    expected = max(paths, key=lambda path: sum(log_probs_UV[u, i] for u, i in enumerate(path)))
    assert tuple(best_path(log_probs_UV, labels)) == expected


def test_the_best_path_of_a_long_text_is_its_own():
    path = [1, 1, 0, 2, 3, 0] * 200
    log_probs_UV = np.where(np.eye(VOCABULARY.size)[path] > 0, -0.1, -5.0)
    assert best_path(log_probs_UV, collapse(path)).tolist() == path


@given(st.lists(st.integers(0, 3), max_size=12))
def test_words_of_a_path_are_those_of_its_labels_in_order_and_apart(path):
    words = path_words(path, np.zeros((len(path), VOCABULARY.size)), VOCABULARY)
    assert [word.text for word in words] == VOCABULARY.decode(collapse(path)).split()
    frames = [frame for word in words for frame in (word.start, word.end)]
    assert frames == sorted(frames)
    assert all(word.start < word.end <= len(path) for word in words)
    assert all(path[word.start] and path[word.end - 1] for word in words)


def test_what_is_no_log_probability_is_refused():
    check_log_probs(np.zeros((0, 4)), VOCABULARY)
    with pytest.raises(DecoderError, match=r"shape \(3, 29\): expected \(U, 4\)"):
        check_log_probs(np.zeros((3, 29)), VOCABULARY)
    with pytest.raises(DecoderError, match="hold NaN"):
        check_log_probs(np.full((3, 4), np.nan), VOCABULARY)
