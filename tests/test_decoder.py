"""Every back end, on real log-probabilities: 16 utterances of AN4 by a model trained on it, and some of its text."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxds2.config import ConfigError
from jaxds2.decoding.decoder import BACKENDS, DecoderChoice, make_decoder, read_hot_words
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.decoding.hypothesis import NOTHING, DecoderError
from jaxds2.decoding.lm import build_ngram, open_model
from jaxds2.decoding.settings import BeamSettings
from jaxds2.evaluation.metrics import count_word_edits
from jaxds2.text import Vocabulary

pytest.importorskip("kenlm")

PACKAGES = {"pyctcdecode": "pyctcdecode", "flashlight": "flashlight", "ctc-beam-decoder": "ctc_beam_decoder"}
WIDE = {"beam_width": 200, "beam_prune_logp": -30.0, "token_min_logp": -12.0}


def needs(backend):
    if importlib.util.find_spec(PACKAGES[backend]) is None:
        pytest.skip(f"back end {backend} is not installed")
    return backend


@pytest.fixture(params=BACKENDS)
def backend(request):
    return needs(request.param)


@pytest.fixture(scope="module")
def an4():
    with np.load(Path(__file__).parent / "an4_logprobs.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def vocabulary(an4):
    return Vocabulary(str(an4["characters"]))


@pytest.fixture(scope="module")
def log_probs(an4):
    return np.split(an4["log_probs"], np.cumsum(an4["lengths"])[:-1])


@pytest.fixture(scope="module")
def lm(an4, tmp_path_factory):
    return build_ngram(str(an4["text"]).splitlines(), tmp_path_factory.mktemp("lm") / "lm.arpa")


def beam(backend, lm=None, **settings):
    return DecoderChoice("beam", backend, lm=lm, beam=BeamSettings(**settings))


def texts(decoder, log_probs):
    return [decoder(log_probs_UV)[0].text for log_probs_UV in log_probs]


def errors(refs, hyps):
    return count_word_edits(list(refs), hyps).errors


@pytest.mark.parametrize("backend", ["pyctcdecode", "ctc-beam-decoder"])
def test_the_two_searches_that_are_the_same_give_the_same(backend, vocabulary, log_probs, lm):
    """ctc_beam_decoder.json has what ctc-beam-decoder 0.2.0 gives: pyctcdecode meets it where that is not installed."""
    decode = make_decoder(beam(needs(backend), lm, beta=2.0, nbest=5), vocabulary)
    golden = json.loads((Path(__file__).parent / "ctc_beam_decoder.json").read_text())
    for log_probs_UV, hypotheses in zip(log_probs, golden, strict=True):
        ours = decode(log_probs_UV)
        assert [h.text for h in ours] == [text for text, _, _ in hypotheses]
        assert [h.total for h in ours] == pytest.approx([total for _, total, _ in hypotheses], abs=1e-3)
        spans = [[[word.start, word.end] for word in h.words] for h in ours]
        assert spans == [spans for _, _, spans in hypotheses]


def test_a_last_space_is_no_word(backend, vocabulary, lm, log_probs):
    # Bought for a bonus, were it one; flashlight has words of its lexicon only.
    log_probs_UV = log_probs[-1].copy()
    log_probs_UV[-1, vocabulary.encode(" ")] = math.log(0.5)
    log_probs_UV[-1, 0] = math.log(0.5)
    choice = beam(backend, lm, alpha=1.0, beta=4.0)
    text = GreedyDecoder(vocabulary)(log_probs_UV)[0].text
    assert texts(make_decoder(choice, vocabulary), [log_probs_UV]) == [text]


def test_a_language_model_of_the_task_mends_more_than_it_breaks(backend, an4, vocabulary, log_probs, lm):
    before = errors(an4["refs"], texts(GreedyDecoder(vocabulary), log_probs))
    after = errors(an4["refs"], texts(make_decoder(beam(backend, lm, beta=2.0), vocabulary), log_probs))
    assert after < before


def test_hypotheses_are_ranked_and_their_scores_add_up(backend, vocabulary, log_probs, lm):
    alpha, beta = 0.6, 1.7
    decoder = make_decoder(beam(backend, lm, alpha=alpha, beta=beta, nbest=8, **WIDE), vocabulary)
    model = open_model(lm, vocabulary)
    listed = 0
    for log_probs_UV in log_probs:
        found = decoder(log_probs_UV)
        listed += len(found)
        assert len({h.text for h in found}) == len(found) <= 8
        assert [h.total for h in found] == sorted((h.total for h in found), reverse=True)
        for h in found:
            assert [w.text for w in h.words] == h.text.split()
            assert all(0 <= w.start < w.end <= len(log_probs_UV) and 0 < w.confidence <= 1 for w in h.words)
            assert h.lm == pytest.approx(model.log_prob(h.text))
            unknown = sum(word not in model.model for word in h.text.split())
            lm_score = h.lm - 10 * math.log(10) * unknown
            assert h.total == pytest.approx(h.acoustic + alpha * lm_score + beta * len(h.words), abs=2e-3)
    assert listed > 4 * len(log_probs)


def test_without_a_model_peaky_frames_are_decoded_as_by_best_path(backend, vocabulary, log_probs):
    sure = [x for x in log_probs if np.exp(x.max(axis=-1)).min() > 0.6]
    assert len(sure) >= 2
    expected = texts(GreedyDecoder(vocabulary), sure)
    assert texts(make_decoder(beam(backend), vocabulary), sure) == expected


def test_an_utterance_without_frames_holds_nothing(backend, vocabulary, log_probs, lm):
    assert make_decoder(beam(backend, lm), vocabulary)(log_probs[0][:0]) == [NOTHING]


def test_what_is_no_log_probability_is_refused(backend, vocabulary):
    decoder = make_decoder(beam(backend), vocabulary)
    with pytest.raises(DecoderError, match=r"shape \(3, 5\): expected \(U, 29\)"):
        decoder(np.zeros((3, 5), np.float32))
    with pytest.raises(DecoderError, match="hold NaN"):
        decoder(np.full((3, 29), np.nan, np.float32))


def test_a_report_says_what_decided_the_text(backend, vocabulary, lm):
    choice = replace(beam(backend, lm, beam_width=7), blank_threshold=0.99, sources={"beam_width": "command line"})
    settings = make_decoder(choice, vocabulary).settings
    assert settings["name"] == "beam"
    assert settings["backend"] == backend
    assert settings["library"].startswith(("pyctcdecode 0.5", "flashlight-text 0.0", "ctc-beam-decoder 0."))
    assert {"lm", "lm_sha256", "alpha", "beta", "beam_prune_logp", "token_min_logp"} <= settings.keys()
    assert (settings["beam_width"], settings["blank_threshold"]) == (7, 0.99)
    assert settings["sources"] == {"beam_width": "command line"}


def test_nothing_is_printed(backend, vocabulary, log_probs, lm, capfd):
    make_decoder(beam(backend, lm), vocabulary)(log_probs[0])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("backend", "module", "command"),
    [
        ("pyctcdecode", "pyctcdecode.decoder", r".+ -m pip install --no-deps pyctcdecode==0\.5\.0 pygtrie"),
        ("flashlight", "flashlight.lib.text", r".+ -m pip install flashlight-text==0\.0\.7"),
        ("ctc-beam-decoder", "ctc_beam_decoder", r".+ -m pip install ctc-beam-decoder==0\.2\.0"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(backend, module, command, vocabulary, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(module)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DecoderError, match=rf"^--backend {backend} needs .*: {command}$"):
        make_decoder(beam(backend), vocabulary)


# Hot words.


def heard(vocabulary, text, *, doubtful, instead):
    """Peaky log-probabilities of a text, but of one character another is as likely."""
    path = [frame for i in vocabulary.encode(text) for frame in (i, 0)]
    probs_UV = np.full((len(path), vocabulary.size), 1e-4)
    probs_UV[np.arange(len(path)), path] = 0.99
    probs_UV[2 * doubtful, vocabulary.encode(text[doubtful] + instead)] = 0.6, 0.39
    return np.log(probs_UV / probs_UV.sum(axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("with_lm", [False, True])
@pytest.mark.parametrize("backend", ["pyctcdecode", "ctc-beam-decoder"])
def test_a_hot_word_is_heard_where_the_sound_is_in_doubt(backend, with_lm, vocabulary, lm):
    log_probs_UV = heard(vocabulary, "enter nime four", doubtful=8, instead="n")
    model = lm if with_lm else None
    plain = beam(needs(backend), model, alpha=0.0, hot_words=())
    hot = beam(backend, model, alpha=0.0, hot_words=(("nine", 5.0),))
    if not with_lm:
        assert texts(make_decoder(plain, vocabulary), [log_probs_UV]) == ["enter nime four"]
    decoder = make_decoder(hot, vocabulary)
    assert texts(decoder, [log_probs_UV]) == ["enter nine four"]
    assert decoder.settings["hot_words"] == {"nine": 5.0}


def test_each_hot_word_has_its_own_weight(vocabulary):
    needs("pyctcdecode")
    log_probs_UV = heard(vocabulary, "enter nime four", doubtful=8, instead="n")
    for weights, text in (((5.0, 1.0), "enter nime four"), ((1.0, 5.0), "enter nine four")):
        hot = tuple(zip(("nime", "nine"), weights, strict=True))
        assert texts(make_decoder(beam("pyctcdecode", hot_words=hot), vocabulary), [log_probs_UV]) == [text]


def test_hot_words_that_change_nothing_leave_the_scores(vocabulary, log_probs, lm):
    needs("pyctcdecode")
    plain, hot = (
        make_decoder(beam("pyctcdecode", lm, hot_words=words), vocabulary) for words in ((), (("qqqq", 5.0),))
    )
    for log_probs_UV in log_probs:
        assert hot(log_probs_UV)[0].text == plain(log_probs_UV)[0].text
        assert hot(log_probs_UV)[0].total == pytest.approx(plain(log_probs_UV)[0].total, abs=1e-3)


def test_a_back_end_without_hot_words_says_so(vocabulary):
    with pytest.raises(ConfigError, match="flashlight has no hot words; take --backend pyctcdecode"):
        make_decoder(beam("flashlight", hot_words=(("nine", 5.0),)), vocabulary)
    needs("ctc-beam-decoder")
    with pytest.raises(ConfigError, match="one weight for all hot words, got 2"):
        make_decoder(beam("ctc-beam-decoder", hot_words=(("nine", 5.0), ("ten", 6.0))), vocabulary)


def test_hot_words_come_from_the_command_line_or_a_file(vocabulary, tmp_path):
    assert read_hot_words("nine:5,Ten", vocabulary) == (("nine", 5.0), ("ten", 10.0))
    (tmp_path / "words.txt").write_text("nine:5\n\nten\n")
    assert read_hot_words(str(tmp_path / "words.txt"), vocabulary) == (("nine", 5.0), ("ten", 10.0))
    many = [a + b for a in "abcdefghij" for b in "abcdefghij"]  # more than a file may be named
    assert [word for word, _ in read_hot_words(":5,".join(many), vocabulary)] == many
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9:3\n")
    with pytest.raises(ConfigError, match=r"latin\.txt: cannot be read as text"):
        read_hot_words(str(tmp_path / "latin.txt"), vocabulary)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nine:much", "hot word 'nine:much': expected word:weight"),
        (" , ", "expected single words"),
        ("one two:3", "expected single words"),
        ("nine:nan", "hot word 'nine:nan': .* a finite number"),
        ("nine:-inf", "hot word 'nine:-inf': .* a finite number"),
        ("nine:5,Nine:3", "hot word 'nine' has two weights, 5 and 3; give it one"),
    ],
)
def test_hot_words_that_are_none_are_refused(text, message, vocabulary):
    with pytest.raises(ConfigError, match=message):
        read_hot_words(text, vocabulary)


def test_hot_words_that_the_alphabet_cannot_spell_are_refused(vocabulary):
    hot = read_hot_words("café:3", vocabulary)
    with pytest.raises(ConfigError, match="hot word 'café': é not in the alphabet"):
        make_decoder(beam("pyctcdecode", hot_words=hot), vocabulary)


# A lexicon.


def test_only_words_of_the_lexicon_come_out(vocabulary, log_probs, lm, tmp_path):
    needs("flashlight")
    known = set(open_model(lm, vocabulary).words)
    found = texts(make_decoder(beam("flashlight", lm), vocabulary), log_probs)
    assert {word for text in found for word in text.split()} <= known
    (tmp_path / "few.txt").write_text("one\ntwo\tanything\n\nthree\none\n")
    for model in (lm, None):
        choice = replace(beam("flashlight", model), lexicon=tmp_path / "few.txt")
        decoder = make_decoder(choice, vocabulary)
        assert decoder.settings["lexicon_words"] == 3
        found = texts(decoder, log_probs)
        assert {word for text in found for word in text.split()} <= {"one", "two", "three"}
        assert any(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "holds no words"),
        ("one\ncafé\nun mot\n", "2 of its 3 words, such as 'café', cannot be spelled"),
        (None, "cannot be read as a list of words"),
    ],
)
def test_a_lexicon_that_cannot_be_used_is_refused(content, message, vocabulary, tmp_path):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DecoderError, match=message):
        make_decoder(replace(beam(needs("flashlight")), lexicon=path), vocabulary)
    with pytest.raises(ConfigError, match="pyctcdecode has no lexicon; take --backend flashlight"):
        make_decoder(replace(beam("pyctcdecode"), lexicon=path), vocabulary)


@pytest.mark.parametrize("threshold", [0.4, 1.0, float("nan")])
def test_a_blank_threshold_is_a_probability(threshold, vocabulary):
    with pytest.raises(ConfigError, match="blank threshold"):
        make_decoder(replace(beam("pyctcdecode"), blank_threshold=threshold), vocabulary)


def test_choosing_a_decoder_imports_none():
    code = (
        "import sys, jaxds2.decoding.decoder; "
        "print(sorted({'jax', 'kenlm', 'pyctcdecode', 'flashlight', 'ctc_beam_decoder'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
