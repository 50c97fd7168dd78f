import gzip
import itertools
import math
import random
import re
import sys
from collections import Counter

import pytest

from jaxds2.data.manifest import ManifestError, Utterance, write_manifest
from jaxds2.decoding.kenlm_tools import build_binary, estimate_by_lmplz
from jaxds2.decoding.lm import (
    LMError,
    build_ngram,
    load_model,
    load_unigrams,
    read_sentences,
    read_text,
    vocabulary_path,
)
from jaxds2.decoding.perplexity import perplexity
from jaxds2.files import WriteError
from jaxds2.text import Vocabulary

kenlm = pytest.importorskip("kenlm")
pytest.importorskip("kaldingram")

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ROUTES = ["turn left at the next light", "turn right at the bank", "stop at the next bank", "go on to the light"]


def some_text(seed=0, lines=200):
    rng = random.Random(seed)
    return [rng.choice(ROUTES) if rng.random() < 0.5 else " ".join(rng.choices(DIGITS, k=4)) for _ in range(lines)]


def total_probability(model, words, history):
    """Of all that may follow a history after the start of a sentence: known words, the end, an unknown word."""
    state, out = kenlm.State(), kenlm.State()
    model.BeginSentenceWrite(state)
    for word in history:
        model.BaseScore(state, word, out)
        state, out = out, kenlm.State()
    return sum(10 ** model.BaseScore(state, word, kenlm.State()) for word in [*words, "</s>", "unheard-of"])


TEXTS = {
    "routes and digits": some_text(),
    # Each of these leaves Kneser and Ney's formula without a usable discount at some order.
    "nothing said twice": ["a b c", "d e f"],
    "everything said twice": ["a b c", "a b c"],
    "everything said thrice": ["a b c", "a b c", "a b c"],
    "everything follows everything": [" ".join(p) for p in itertools.permutations("abc")] + ["a", "b", "c"],
    "one word": ["yes", "yes", "yes yes"],
}


@pytest.mark.parametrize(("order", "prune"), [(2, ()), (3, ()), (3, (0, 1, 2)), (3, (0, 0, 1)), (2, (0, 100))])
@pytest.mark.parametrize("name", TEXTS)
def test_probabilities_sum_to_one_after_any_history(name, order, prune, tmp_path):
    model = load_model(path := build_ngram(TEXTS[name], tmp_path / "lm.arpa", order=order, prune=prune))
    words = load_unigrams(path)
    assert model.order == order
    for sentence in {*TEXTS[name][:6], "unheard-of", f"{words[-1]} {words[-1]} {words[0]}"}:
        tokens = sentence.split()
        for end in range(len(tokens) + 1):
            assert total_probability(model, words, tokens[:end]) == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("name", TEXTS)
def test_what_was_seen_is_likelier_than_unseen(name, tmp_path):
    text = TEXTS[name]
    model = load_model(build_ngram(text, tmp_path / "lm.arpa"))
    for sentence in set(text[:6]):
        words = sentence.split()
        assert model.score(sentence) > model.score(" ".join([*words[:-1], "unheard-of"]))
        assert model.perplexity(sentence) < 100


def test_a_sentence_beats_its_words_shuffled(tmp_path):
    model = load_model(build_ngram(some_text(), tmp_path / "lm.arpa"))
    for sentence in ROUTES:
        backwards = " ".join(reversed(sentence.split()))
        assert model.score(sentence) > model.score(backwards) + 2


def test_perplexity_of_random_digits_is_their_number(tmp_path):
    rng = random.Random(0)
    train, test = ([" ".join(rng.choices(DIGITS, k=30)) for _ in range(n)] for n in (600, 50))
    model = load_model(build_ngram(train, tmp_path / "lm.arpa", order=2))
    tokens = sum(len(s.split()) + 1 for s in test)
    perplexity = 10 ** (-sum(model.score(s) for s in test) / tokens)
    # Each of 30 digits costs log 10; the end of the sentence comes once in 31.
    assert perplexity == pytest.approx(math.exp((30 * math.log(10 * 31 / 30) + math.log(31)) / 31), rel=0.03)


def test_unknown_words_have_a_probability(tmp_path):
    path = build_ngram(some_text(), tmp_path / "lm.arpa")
    assert path.read_text().count("\t<unk>\n") == 1
    assert -6 < load_model(path).score("unheard-of", bos=False, eos=False) < 0


def test_the_same_text_gives_the_same_file(tmp_path):
    a, b = (build_ngram(iter(some_text()), tmp_path / f"{name}.arpa") for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert vocabulary_path(a).read_text().splitlines() == sorted({word for s in some_text() for word in s.split()})


def test_words_are_those_of_the_text_and_of_the_list_beside(tmp_path):
    path = build_ngram(["naïve café", "naïve", " ", ""], tmp_path / "deep" / "lm.arpa", order=2)
    assert sorted(load_unigrams(path)) == ["café", "naïve"]
    assert vocabulary_path(path).read_text() == "café\nnaïve\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["lm.arpa", "lm.vocab.txt"]
    zipped = tmp_path / "lm.arpa.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert load_unigrams(zipped) == load_unigrams(path)


def test_words_of_a_binary_come_from_the_list_beside(tmp_path):
    binary = tmp_path / "lm.binary"
    binary.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(100))
    with pytest.raises(LMError, match=r"keeps no list of its words, and there is no .*lm\.vocab\.txt"):
        load_unigrams(binary)
    vocabulary_path(binary).write_text("<s>\none\ntwo\n")
    assert load_unigrams(binary) == ["one", "two"]


def test_sentences_come_from_text_and_from_manifests(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\n  \nthree\n")
    assert read_sentences(tmp_path / "a.txt") == ["one two", "three"]
    write_manifest(
        tmp_path / "a.jsonl", [Utterance(id="u", audio_filepath=tmp_path / "u.wav", duration=1.0, text="hi")]
    )
    assert read_sentences(tmp_path / "a.jsonl") == ["hi"]
    with pytest.raises(LMError, match=r"none\.txt: cannot be read as text"):
        read_sentences(tmp_path / "none.txt")
    with pytest.raises(ManifestError, match=r"none\.jsonl"):
        read_sentences(tmp_path / "none.jsonl")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LMError, match=r"b\.txt: cannot be read as text"):
        read_sentences(tmp_path / "b.txt")


def test_text_is_normalised_and_the_words_that_the_alphabet_cannot_spell_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("One, two\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("caf\u00e9 one na\u00efve\n", encoding="utf-8")
    letters = Vocabulary("abcdefghijklmnopqrstuvwxyz' ")
    text = read_text([tmp_path / "a.txt", tmp_path / "b.txt"], letters)
    assert text.sentences == ["one two", "caf\u00e9 one na\u00efve"]
    assert (text.words, text.foreign) == (5, ["caf\u00e9", "na\u00efve"])
    assert (text.remark() or "").startswith("2 of 5 words, 'caf\u00e9' first, have characters outside the alphabet ")
    assert read_text([tmp_path / "a.txt"], letters).remark() is None


@pytest.mark.parametrize("estimate", [build_ngram, estimate_by_lmplz])
@pytest.mark.parametrize(
    ("sentences", "order", "message"),
    [
        ([], 3, r"holds 0 sentence\(s\): .* two or more, one a line"),
        (["", "  "], 3, r"holds 0 sentence\(s\)"),
        (["all of the text on one line"], 3, r"holds 1 sentence\(s\)"),
        (["a b", "c"], 0, "order 0: KenLM reads models of order 2 to 6"),
        (["a b", "c"], 1, "order 1"),
        (["a b", "c"], 7, "order 7"),
        (["a b", "c"], 5, "order 5: .* makes 4 tokens; use at most 4"),
        (["a <s> b", "c"], 2, "holds <s>"),
    ],
)
def test_text_that_makes_no_model_is_refused(sentences, order, message, estimate, tmp_path):
    with pytest.raises(LMError, match=message):
        estimate(sentences, tmp_path / "lm.arpa", order=order)
    assert not list(tmp_path.iterdir())


def ngrams(path):
    """N-grams of an ARPA file by their length."""
    found: dict[int, set[tuple[str, ...]]] = {}
    for line in path.read_text().splitlines():
        if match := re.fullmatch(r"\\(\d)-grams:", line):
            order = int(match[1])
            found[order] = set()
        elif found and "\t" in line:
            found[order].add(tuple(line.split("\t")[1].split()))
    return found


def test_pruning_leaves_out_what_came_so_rarely_and_nothing_else(tmp_path):
    text = some_text(lines=40)
    whole, pruned = (
        ngrams(build_ngram(text, tmp_path / f"{i}.arpa", prune=prune)) for i, prune in enumerate([(), (0, 1, 3)])
    )
    seen = [("<s>", *s.split(), "</s>") for s in text]
    for order, threshold in ((1, 0), (2, 1), (3, 3)):
        counts = Counter(s[i : i + order] for s in seen for i in range(len(s) - order + 1))
        expected = {n for n, count in counts.items() if count > threshold}
        assert pruned[order] - {("<unk>",)} == expected
        assert whole[order] - {("<unk>",)} == set(counts)


@pytest.mark.parametrize("prune", [(1,), (0, 2, 1), (0, 0, 0, 0)])
def test_pruning_that_means_nothing_is_refused(prune, tmp_path):
    with pytest.raises(LMError, match=f"pruning {' '.join(map(str, prune))}: expected at most 3 thresholds"):
        build_ngram(["a b", "c"], tmp_path / "lm.arpa", order=3, prune=prune)


def test_perplexity_is_what_kenlm_says_of_each_sentence_and_counts_each_token_once(tmp_path):
    model = load_model(build_ngram(some_text(), tmp_path / "lm.arpa"))
    texts = [*some_text(seed=1, lines=20), "turn unheard-of left", "unheard-of", " "]
    corpus = perplexity(model, texts)
    assert [s.text for s in corpus.sentences] == texts[:-1]
    for s in corpus.sentences:
        assert s.log10 == pytest.approx(model.score(s.text), abs=1e-4)
        assert s.perplexity == pytest.approx(model.perplexity(s.text), rel=1e-4)
        assert s.unknown == s.text.count("unheard-of")
    tokens = sum(len(text.split()) + 1 for text in texts[:-1])
    assert corpus.perplexity == pytest.approx(10 ** (-sum(map(model.score, texts[:-1])) / tokens), rel=1e-4)
    assert corpus.unknown == 2
    known = perplexity(model, texts[:-3])
    assert known.perplexity == known.known_perplexity
    assert corpus.known_perplexity < corpus.perplexity
    assert "22 sentences" in corpus.render()
    with pytest.raises(LMError, match="no sentence to score"):
        perplexity(model, ["", " "])


def fake_program(folder, name, script):
    """A program of KenLM's name in a folder of its own."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder


def test_kenlms_programs_are_called_as_they_want_to_be(tmp_path, monkeypatch):
    # lmplz writes its arguments and its text where the ARPA file belongs: the last argument.
    bin_ = fake_program(tmp_path / "bin", "lmplz", 'for last; do :; done; { echo "$@"; cat; } > "$last"')
    fake_program(bin_, "build_binary", 'cp "$1" "$2"')
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    out = estimate_by_lmplz(["b a", "", "c"], tmp_path / "lm.arpa", order=3, prune=(0, 0, 1))
    first, *text = out.read_text().splitlines()
    assert first.startswith("--order 3 --discount_fallback --prune 0 0 1 --arpa ")
    assert text == ["b a", "c"]
    assert vocabulary_path(out).read_text() == "a\nb\nc\n"
    assert build_binary(out).read_text() == out.read_text()
    assert build_binary(out).name == "lm.binary"


def test_kenlms_programs_that_are_missing_or_fail_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(LMError, match="lmplz is not on the PATH; it is one of KenLM's programs"):
        estimate_by_lmplz(["a b", "c"], tmp_path / "lm.arpa", order=2)
    bin_ = fake_program(tmp_path / "bin", "build_binary", "echo one >&2; echo it is so >&2; exit 1")
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    with pytest.raises(LMError, match="build_binary failed: it is so"):
        build_binary(tmp_path / "lm.arpa")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin"]


def test_files_that_are_no_model_are_refused(tmp_path):
    missing, text, broken = tmp_path / "none.arpa", tmp_path / "a.txt", tmp_path / "broken.arpa"
    with pytest.raises(LMError, match=r"no language model .*; build one with `jaxds2 lm build TEXT --out"):
        load_unigrams(missing)
    text.write_text("one two\n")
    with pytest.raises(LMError, match="expected an ARPA file or a KenLM binary"):
        load_unigrams(text)
    junk = random.Random(0).randbytes(1000)
    whole = build_ngram(some_text(), tmp_path / "lm.arpa").read_text()
    neither = r"^[^\n]+: neither an ARPA file \(UTF-8 text\) nor a KenLM binary, .*; build one with `jaxds2 lm build"
    for content in (junk, gzip.compress(junk), b"\xff" * 10, whole.replace("bank", "b\xe4nk").encode("latin-1")):
        (tmp_path / "junk.bin").write_bytes(content)
        with pytest.raises(LMError, match=neither):
            load_unigrams(tmp_path / "junk.bin")
    (tmp_path / "junk.bin").write_bytes(gzip.compress(whole.encode())[:10] + b"\xff" * 100)
    with pytest.raises(LMError, match=r"junk\.bin: cannot be read \("):
        load_unigrams(tmp_path / "junk.bin")
    broken.write_text(whole[: len(whole) // 2])
    with pytest.raises(LMError, match=r"broken\.arpa: KenLM cannot read it"):
        load_model(broken)


@pytest.mark.parametrize("package", ["kenlm", "kaldingram.train"])
def test_a_missing_package_is_named_with_its_remedy(package, tmp_path, monkeypatch):
    path = build_ngram(["a b", "c"], tmp_path / "lm.arpa")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LMError, match=rf"needs {package.split('.')[0]}: .+ -m pip install kaldingram kenlm-ex"):
        build_ngram(["a b", "c"], tmp_path / "lm.arpa") if package != "kenlm" else load_model(path)


def test_nothing_is_printed_but_progress(tmp_path, capfd):
    load_model(build_ngram(some_text(), tmp_path / "lm.arpa"))
    out, err = capfd.readouterr()
    assert out == ""
    assert set(re.findall(r"[A-Za-z][\w -]+", re.sub(r"\[.*?\]", "", err))) <= {"count n-grams", "estimate"}


def test_a_model_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/lm\.vocab\.txt: cannot be written \(Not a directory\)"):
        build_ngram(ROUTES, tmp_path / "file" / "lm.arpa", order=2)
