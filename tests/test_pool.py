import os
import signal
from functools import partial

import numpy as np
import pytest

from jaxds2.config import ConfigError
from jaxds2.decoding.decoder import DecoderChoice, make_decoder
from jaxds2.decoding.hypothesis import DecoderError
from jaxds2.decoding.pool import AHEAD, Pool, open_pool
from jaxds2.text import Vocabulary


def worker(item):
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "fail":
        raise DecoderError("bad frames")
    return item, os.getpid()


def make_worker():
    return worker


def dying_make():
    os._exit(3)


@pytest.fixture(scope="module")
def pool():
    with Pool(make_worker, 2) as pool:
        yield pool


def test_results_come_in_the_order_of_the_items_from_other_processes(pool):
    items = list(range(5 * AHEAD))
    results = list(pool.map(items))
    assert [item for item, _ in results] == items
    assert os.getpid() not in {process for _, process in results}


def test_items_are_taken_a_bounded_number_ahead(pool):
    taken = []
    results = pool.map(taken.append(i) or i for i in range(1000))
    next(results)
    assert len(taken) == 2 * AHEAD
    results.close()


def test_what_the_work_raises_is_raised_here(pool):
    with pytest.raises(DecoderError, match="bad frames"):
        list(pool.map([1, "fail", 2]))


@pytest.mark.parametrize("make", [make_worker, dying_make])
def test_a_process_that_dies_is_an_error_and_not_a_hang(make):
    with (
        Pool(make, 1) as pool,
        pytest.raises(DecoderError, match=r"ended before its work was done.*--decode-workers"),
    ):
        list(pool.map([1, "die", 2]))


def test_no_processes_are_no_pool():
    with open_pool(make_worker, 0) as none:
        assert none is None
    with pytest.raises(ConfigError, match="-1 decoding processes"), open_pool(make_worker, -1):
        pass


def test_any_number_of_processes_decodes_alike():
    items = [np.log(np.random.default_rng(i).dirichlet(np.ones(4), size=i)) for i in range(50)]
    make = partial(make_decoder, DecoderChoice(), Vocabulary("ab "))
    expected = list(map(make(), items))
    for workers in (1, 2):
        with Pool(make, workers) as pool:
            assert list(pool.map(items)) == expected
