import itertools
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxds2.config import ConfigError
from jaxds2.decoding.beam import BeamDecoder
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.decoding.hypothesis import NOTHING, DecoderError, collapse
from jaxds2.decoding.lm import LMError, build_ngram, load_model, open_model
from jaxds2.decoding.settings import BeamSettings
from jaxds2.text import Vocabulary

pytest.importorskip("pyctcdecode")
pytest.importorskip("kenlm")

AB = Vocabulary("ab ")
LETTERS = Vocabulary("abcdefghijklmnopqrstuvwxyz' ")
EXHAUSTIVE = {"beam_width": 100_000, "beam_prune_logp": -1e4, "token_min_logp": -1e4}


def beam(vocabulary, *, lm=None, **settings):
    return BeamDecoder(vocabulary, BeamSettings(**settings), lm=lm and open_model(lm, vocabulary))


def text_of(decoder, log_probs_UV):
    return decoder(log_probs_UV)[0].text


def log_softmax(logits_UV):
    return logits_UV - np.log(np.exp(logits_UV).sum(-1, keepdims=True))


def text_log_probs(log_probs_UV, vocabulary):
    """log P_CTC of every text, by summing over all V^U paths."""
    probs: dict[str, float] = {}
    frames = range(len(log_probs_UV))
    for path in itertools.product(range(vocabulary.size), repeat=len(log_probs_UV)):
        text = " ".join(vocabulary.decode(collapse(path)).split())
        probs[text] = probs.get(text, 0.0) + math.exp(sum(log_probs_UV[u, path[u]] for u in frames))
    return {text: math.log(p) for text, p in probs.items()}


def spell(text, *, peak=6.0):
    """Peaky log-probabilities of a text: two frames a character, a blank after each."""
    path = [frame for i in LETTERS.encode(text) for frame in (i, i, 0)]
    logits_UV = np.zeros((len(path), LETTERS.size), np.float32)
    logits_UV[np.arange(len(path)), path] = peak
    return logits_UV


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    text = ["read the red book", "the red book", "the sea", "see the red sea", "read the book", "i see the sea"] * 3
    return build_ngram(text, tmp_path_factory.mktemp("lm") / "lm.arpa")


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_wide_beam_finds_the_text_that_brute_force_finds(seed, num_frames):
    letters = Vocabulary("abc")
    logits_UV = np.random.default_rng(seed).normal(size=(num_frames, letters.size)) * 2
    log_probs_UV = log_softmax(logits_UV).astype(np.float32)
    expected = text_log_probs(log_probs_UV, letters)
    found = text_of(beam(letters, **EXHAUSTIVE), log_probs_UV)
    assert expected[found] == pytest.approx(max(expected.values()), abs=1e-4)


def test_a_text_of_many_alignments_beats_the_best_path():
    # The best path is all blank, but more of the probability spells `a`.
    log_probs_UV = np.log(np.array([[0.5, 0.4, 0.05, 0.05]] * 2, np.float32))
    assert text_of(GreedyDecoder(AB), log_probs_UV) == ""
    assert text_of(beam(AB), log_probs_UV) == "a"


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_score_of_every_text_is_ctc_plus_alpha_lm_plus_beta_words(lm_ab, seed):
    rng = np.random.default_rng(seed)
    alpha, beta = rng.uniform(0, 1.5), rng.uniform(-1, 2)
    logits_UV = rng.normal(size=(5, AB.size)) * 1.5
    log_probs_UV = log_softmax(logits_UV)
    model = load_model(lm_ab)

    def score(text, log_p):
        unknown = sum(word not in model for word in text.split())
        return log_p + alpha * math.log(10) * (model.score(text) - 10 * unknown) + beta * len(text.split())

    expected = {text: score(text, log_p) for text, log_p in text_log_probs(log_probs_UV, AB).items()}
    decoder = beam(AB, lm=lm_ab, alpha=alpha, beta=beta, **EXHAUSTIVE, nbest=10_000)
    found = {h.text: h.total for h in decoder(log_probs_UV)}
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_last_space_is_no_word(lm):
    logits_UV = spell("see the red sea")
    logits_UV[-1, LETTERS.encode(" ")] = 5.0
    log_probs_UV = log_softmax(logits_UV)
    assert text_of(beam(LETTERS, lm=lm, alpha=1.0, beta=4.0), log_probs_UV) == "see the red sea"


def test_silence_has_no_words(lm):
    assert beam(LETTERS, lm=lm)(np.zeros((0, LETTERS.size), np.float32)) == [NOTHING]
    silence_UV = np.zeros((20, LETTERS.size), np.float32)
    silence_UV[:, 0] = 8.0
    assert text_of(beam(LETTERS, lm=lm, alpha=1.0, beta=0.0), log_softmax(silence_UV)) == ""


@pytest.fixture(scope="module")
def lm_ab(tmp_path_factory):
    return build_ngram(["a b a", "b a", "ab a", "b", "ab b a"], tmp_path_factory.mktemp("ab") / "ab.arpa", order=2)


@settings(max_examples=30)
@given(st.text(alphabet="abc ", min_size=0, max_size=12))
def test_peaky_frames_without_a_model_are_decoded_as_by_best_path(text):
    log_probs_UV = log_softmax(spell(text))
    expected = " ".join(text.split())
    assert text_of(GreedyDecoder(LETTERS), log_probs_UV) == expected
    assert text_of(beam(LETTERS), log_probs_UV) == expected


def test_the_model_settles_what_the_sound_leaves_open(lm):
    heard = "read the read book"
    logits_UV = spell(heard)
    a = heard.rindex("a")
    logits_UV[3 * a : 3 * a + 2, 0] = 5.5  # almost nothing was heard of this one, against 6.0
    log_probs_UV = log_softmax(logits_UV)
    assert text_of(GreedyDecoder(LETTERS), log_probs_UV) == heard
    assert text_of(beam(LETTERS), log_probs_UV) == heard
    assert text_of(beam(LETTERS, lm=lm, alpha=0.0), log_probs_UV) == heard
    assert text_of(beam(LETTERS, lm=lm), log_probs_UV) == "read the red book"


def test_settings_tell_everything_that_decides_the_text(lm):
    plain = beam(LETTERS, beam_width=7, beam_prune_logp=-8, token_min_logp=-4).settings
    assert plain == {
        "name": "beam",
        "library": "pyctcdecode 0.5.0",
        "beam_width": 7,
        "beam_prune_logp": -8.0,
        "token_min_logp": -4.0,
        "prune_history": True,
    }
    with_lm = beam(LETTERS, lm=lm, alpha=1, beta=2).settings
    assert (
        with_lm.items()
        >= {
            "lm": str(lm),
            "lm_order": 3,
            "lm_words": 7,
            "alpha": 1.0,
            "beta": 2.0,
            "unknown_offset": -10.0,
        }.items()
    )
    assert len(with_lm["lm_sha256"]) == 64


def test_a_model_of_another_alphabet_is_refused(lm, tmp_path):
    capitals = build_ngram(["READ THE BOOK", "THE RED SEA"], tmp_path / "capitals.arpa")
    with pytest.raises(LMError, match=r"capitals\.arpa: 5 of its 5 words, such as 'READ', .* lower case"):
        beam(LETTERS, lm=capitals)
    with pytest.raises(LMError, match=r"7 of its 7 words, .*'ab ': this is the language model of another vocabulary$"):
        beam(AB, lm=lm)
    with pytest.raises(LMError, match="needs a space in the alphabet 'abc'"):
        beam(Vocabulary("abc"), lm=lm)


def test_a_few_foreign_words_are_left_out_and_counted(tmp_path):
    mixed = build_ngram(["one two three", "two café one"], tmp_path / "mixed.arpa")
    settings = beam(LETTERS, lm=mixed).settings
    assert (settings["lm_words"], settings["lm_words_left_out"]) == (3, 1)


def test_a_word_list_of_another_model_is_refused(lm, monkeypatch):
    monkeypatch.setattr("jaxds2.decoding.lm.load_unigrams", lambda _: ["alpha", "bravo", "sea"])
    with pytest.raises(LMError, match="knows 1 of the 3 words listed for it"):
        beam(LETTERS, lm=lm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nbest": 0}, "0 hypotheses: must be at least 1"),
        ({"beam_width": 0}, "beam width 0: must be at least 1"),
        ({"beam_prune_logp": 10.0}, "pruning at 10.0 and -5.0 nats: both must be below 0"),
        ({"token_min_logp": float("nan")}, "pruning at -10.0 and nan nats: both must be below 0"),
        ({"beam_prune_logp": float("nan")}, "pruning at nan and -5.0 nats: both must be below 0"),
        ({"beam_prune_logp": -math.inf}, "pruning at -inf and -5.0 nats: .* finite; -1e4 drops nothing"),
        ({"token_min_logp": -math.inf}, "pruning at -10.0 and -inf nats: .* finite; -1e4 drops nothing"),
        ({"alpha": -0.1}, "alpha must be 0 or more"),
        ({"beta": float("nan")}, "both finite"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        BeamSettings(**arguments)


def test_what_is_no_log_probability_is_refused():
    decoder = beam(AB)
    with pytest.raises(DecoderError, match=r"shape \(3, 29\): expected \(U, 4\)"):
        decoder(np.zeros((3, 29), np.float32))
    with pytest.raises(DecoderError, match="hold NaN"):
        decoder(np.full((3, 4), np.nan, np.float32))


def test_missing_packages_are_named_with_their_remedy(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(LMError, match=r"-m pip install kaldingram kenlm-ex"):
        beam(LETTERS, lm=lm)
    monkeypatch.setitem(sys.modules, "pyctcdecode.decoder", None)
    with pytest.raises(DecoderError, match=r"-m pip install --no-deps pyctcdecode==0.5.0 pygtrie"):
        beam(LETTERS)


def test_nothing_is_printed(lm, capfd, caplog):
    beam(LETTERS, lm=lm)(log_softmax(spell("the sea")))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_words_have_the_frames_in_which_they_are_spelled(lm):
    log_probs_UV = log_softmax(spell("read the book"))
    best = beam(LETTERS, lm=lm)(log_probs_UV)[0]
    assert best.text == "read the book"
    # Three frames a character, the last of them blank.
    assert [(word.text, word.start // 3, -(-word.end // 3)) for word in best.words] == [
        ("read", 0, 4),
        ("the", 5, 8),
        ("book", 9, 13),
    ]
    peak = math.exp(log_probs_UV.max())
    assert [word.confidence for word in best.words] == pytest.approx([peak] * 3, rel=1e-5)


def test_the_list_of_hypotheses_is_ranked_by_its_scores(lm):
    rng = np.random.default_rng(0)
    log_probs_UV = log_softmax(spell("read the red book", peak=3.0) + rng.normal(size=(3 * 17, LETTERS.size)))
    alpha, beta = 0.7, 1.5
    decoder = beam(LETTERS, lm=lm, alpha=alpha, beta=beta, beam_prune_logp=-60.0, nbest=20)
    found = decoder(log_probs_UV)
    assert len(found) == 20
    assert len({h.text for h in found}) == 20
    assert [h.total for h in found] == sorted((h.total for h in found), reverse=True)
    model = load_model(lm)
    for h in found:
        unknown = sum(word not in model for word in h.text.split())
        assert h.lm == pytest.approx(model.score(h.text) * math.log(10))
        offset = -10 * math.log(10) * unknown
        assert h.total == pytest.approx(h.acoustic + alpha * (h.lm + offset) + beta * len(h.words), abs=1e-3)
        assert [w.text for w in h.words] == h.text.split()
    assert decoder.settings["prune_history"] is False
