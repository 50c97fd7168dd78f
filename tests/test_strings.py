"""Strings that processes share: as they were, in every process, and gone when all have let go."""

import multiprocessing
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxds2.data.strings import SharedStrings


@given(st.lists(st.text()))
def test_every_string_comes_back(strings):
    shared = SharedStrings(iter(strings))
    assert [shared[i] for i in range(len(shared))] == strings
    shared.close()


def test_a_file_name_that_is_not_utf8_comes_back():
    shared = SharedStrings(["caf\udce9.wav"])
    assert shared[0] == "caf\udce9.wav"
    shared.close()


@pytest.mark.parametrize("index", [-1, 2])
def test_a_string_that_is_not_there_is_an_error(index):
    shared = SharedStrings(["a", "b"])
    with pytest.raises(IndexError, match=f"string {index} of 2"):
        shared[index]
    shared.close()


def _read(shared):
    return [shared[i] for i in range(len(shared))]


def test_another_process_reads_them_and_is_handed_next_to_nothing():
    strings = [f"utterance {i}" for i in range(10_000)]
    shared = SharedStrings(strings)
    assert len(pickle.dumps(shared)) < 200
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read, (shared,)) == strings
    shared.close()


def test_whoever_has_them_keeps_them_and_nobody_gets_them_after_close():
    shared = SharedStrings(["a", "b"])
    handed = pickle.dumps(shared)
    other = pickle.loads(handed)
    shared.close()
    assert _read(other) == ["a", "b"]
    with pytest.raises(FileNotFoundError):
        pickle.loads(handed)
