import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxds2.decoding.blanks import BlanksCollapsed, kept_frames
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.decoding.hypothesis import collapse
from jaxds2.text import Vocabulary

VOCABULARY = Vocabulary("ab ")
SURE = 0.999


def of_path(path, p=0.9995):
    probs_UV = np.full((len(path), VOCABULARY.size), (1 - p) / (VOCABULARY.size - 1))
    probs_UV[np.arange(len(path)), path] = p
    return np.log(probs_UV)


def test_of_a_run_of_sure_blanks_the_first_stays():
    path = [0, 0, 1, 0, 0, 0, 1, 0]
    assert kept_frames(of_path(path), SURE).tolist() == [0, 2, 3, 6, 7]
    unsure_UV = of_path(path)
    unsure_UV[4] = of_path([0], p=0.99)
    assert kept_frames(unsure_UV, SURE).tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert kept_frames(unsure_UV[:0], SURE).tolist() == []


@given(st.lists(st.integers(0, 3), max_size=15))
def test_neither_labels_nor_words_nor_scores_change(path):
    log_probs_UV = of_path(path)
    kept_K = kept_frames(log_probs_UV, SURE)
    assert collapse(np.array(path)[kept_K] if path else []) == collapse(path)
    (whole,) = GreedyDecoder(VOCABULARY)(log_probs_UV)
    (collapsed,) = BlanksCollapsed(GreedyDecoder(VOCABULARY), SURE)(log_probs_UV)
    assert collapsed.text == whole.text
    spans = [[(w.text, w.start, w.end) for w in h.words] for h in (whole, collapsed)]
    assert spans[0] == spans[1]
    assert [w.confidence for w in collapsed.words] == pytest.approx([w.confidence for w in whole.words])
    assert (collapsed.acoustic, collapsed.total) == pytest.approx((whole.acoustic, whole.total))


def test_settings_are_those_inside_and_the_threshold():
    assert BlanksCollapsed(GreedyDecoder(VOCABULARY), 0.99).settings == {"name": "greedy", "blank_threshold": 0.99}
