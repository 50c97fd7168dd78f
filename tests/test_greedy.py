import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxds2.decoding.greedy import collapse, greedy_decode
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
