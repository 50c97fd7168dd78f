"""n-gram language models: their text, building one, loading one.

A model is an ARPA file, or a KenLM binary made of one. KenLM's binaries keep no list of their words, which beam search
needs, so a word list lies beside each model: `lm.vocab.txt` for `lm.arpa` and `lm.binary`.
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import shlex
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from jaxds2.data.manifest import read_manifest
from jaxds2.files import write_whole
from jaxds2.text import Vocabulary

if TYPE_CHECKING:
    import kenlm

MIN_ORDER, MAX_ORDER = 2, 6
"""What KenLM as it is packaged reads."""

INSTALL = f"{shlex.quote(sys.executable)} -m pip install kaldingram kenlm-ex"

_BINARY_MAGIC = b"mmap lm http://kheafield.com/code"
_MARKS = frozenset(("<s>", "</s>", "<unk>"))
_MIN_DISCOUNT, _FALLBACK_DISCOUNT = 0.1, 0.5


class LMError(ValueError):
    """A language model that cannot be built or used; its message is one line for the user."""


def read_sentences(path: Path) -> list[str]:
    """The sentences of a text file, one a line, blank lines left out; of a `.jsonl` manifest or a folder of shards,
    its texts.

    Raises:
      LMError: no such file, or not UTF-8. ManifestError: a bad manifest.
    """
    if path.suffix == ".jsonl" or path.is_dir():
        return [u.text for u in read_manifest(path)]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise LMError(f"{path}: cannot be read as text ({_reason(e)})") from None
    return [line for line in lines if line.strip()]


@dataclass(frozen=True)
class Text:
    """Sentences in the form that a language model wants them."""

    sentences: list[str]
    """Normalised."""
    words: int
    """In all of them."""
    foreign: list[str]
    """Those of the words that the alphabet cannot spell, as they come."""
    characters: str
    """The alphabet."""

    def remark(self) -> str | None:
        """A line on the foreign words; None: there are none."""
        if not self.foreign:
            return None
        return (
            f"{len(self.foreign):,} of {self.words:,} words, {self.foreign[0]!r} first, have characters outside the "
            f"alphabet {self.characters!r}: a recognizer with that alphabet can never write them; --run DIR or "
            f"--characters name another"
        )


def read_text(paths: Iterable[Path], vocabulary: Vocabulary) -> Text:
    """The sentences of several texts or manifests, normalised by the alphabet.

    Raises:
      As read_sentences.
    """
    sentences = [vocabulary.normalize(s) for path in paths for s in read_sentences(path)]
    words = [word for sentence in sentences for word in sentence.split()]
    return Text(sentences, len(words), [word for word in words if vocabulary.unknown(word)], vocabulary.characters)


def build_ngram(sentences: Iterable[str], out: Path, *, order: int = 3, prune: Sequence[int] = ()) -> Path:
    """Estimate a back-off n-gram model with Kneser-Ney smoothing and write it with its word list.

    Kneser & Ney (1995), one discount D = n1 / (n1 + 2 n2) per order (n1, n2: n-grams seen once, twice), counted by
    kaldingram in pure Python, so that every machine writes the same file. On small text two things are added. Unigrams
    are discounted too, and what that frees goes to `<unk>`: so the model sums to 1 after every history and an unknown
    word has a probability. Where counts leave no usable D, it is 0.5.

    KenLM's lmplz (`kenlm_tools`) is faster and models a little better, but no wheel brings it.

    Args:
      sentences: normalised text; words are what white space separates, blank sentences are left out.
      out: the ARPA file to write; its words go to the same name with `.vocab.txt`, one a line, sorted.
      order: length of the longest n-grams, 2 to 6.
      prune: thresholds for each order, as lmplz has them: n-grams counted so often or less are left out, the last one
        holds for all longer ones. Unigrams are never left out, so the first is 0. What is left out gives its
        probability to the back-off.

    Returns:
      out.

    Raises:
      LMError: kaldingram is missing, order out of range or above what the sentences hold, fewer than two sentences.
      WriteError: a file cannot be written.
    """
    if not MIN_ORDER <= order <= MAX_ORDER:
        raise LMError(f"order {order}: KenLM reads models of order {MIN_ORDER} to {MAX_ORDER}")
    thresholds = _thresholds(prune, order)
    try:
        from kaldingram.train import NgramCounts
    except ImportError:
        raise LMError(f"building a language model needs kaldingram: {INSTALL}") from None

    counts = NgramCounts(order)
    words: set[str] = set()
    num_sentences = longest = 0
    for sentence in tqdm(sentences, desc="count n-grams", unit="sentence", leave=False, disable=None):
        tokens = sentence.split()
        if not tokens:
            continue
        counts.add_raw_counts_from_line(" ".join(tokens))
        words.update(tokens)
        num_sentences += 1
        longest = max(longest, len(tokens) + 2)
    check_text(num_sentences, longest, words, order)
    arpa = io.StringIO()
    stages = (
        partial(_set_discounts, counts),
        counts.cal_f,
        partial(_prune, counts, thresholds),
        counts.cal_bow,
        partial(counts.print_as_arpa, arpa),
    )
    bar = tqdm(stages, desc="estimate", unit="stage", leave=False, disable=None)
    with contextlib.redirect_stderr(io.StringIO()):  # the library draws a bar for every order of every stage
        for stage in bar:
            stage()
    unigrams = counts.counts[0][()].word_to_f
    unknown = 1.0 - sum(unigrams.values())
    write_whole(vocabulary_path(out), "".join(f"{word}\n" for word in sorted(words)))
    write_whole(out, _with_unknown(arpa.getvalue(), len(unigrams), unknown))
    return out


def check_text(num_sentences: int, longest: int, words: AbstractSet[str], order: int) -> None:
    """Refuse text that makes no model of this order.

    Args:
      num_sentences: that hold words.
      longest: tokens of the longest one, its two ends among them.
      words: all that come.
      order: of the model.

    Raises:
      LMError: what build_ngram says of the sentences.
    """
    if num_sentences < 2:
        raise LMError(
            f"the text holds {num_sentences} sentence(s): a language model needs two or more, one a line "
            f"(or a .jsonl manifest)"
        )
    if longest < order:
        raise LMError(
            f"order {order}: with its two ends the longest sentence makes {longest} tokens; use at most {longest}"
        )
    if reserved := sorted(words & _MARKS):
        raise LMError(f"the text holds {reserved[0]}, which a language model keeps for itself: remove it")


def _set_discounts(counts) -> None:
    counts.cal_discounting_constants()
    unigrams = counts.counts[0][()]
    frequencies = [len(contexts) for contexts in unigrams.word_to_context.values()]
    once, twice = frequencies.count(1), frequencies.count(2)
    counts.d[0] = once / (once + 2 * twice) if once else 0.0
    # At D = 1 what was seen once would be as good as unseen; at 0 nothing is left for what was not.
    counts.d = [_FALLBACK_DISCOUNT if d >= 1 else max(d, _MIN_DISCOUNT) for d in counts.d]


def _thresholds(prune: Sequence[int], order: int) -> list[int]:
    """A threshold for each order."""
    given = list(prune) or [0]
    if len(given) > order or given[0] != 0 or given != sorted(given):
        raise LMError(
            f"pruning {' '.join(map(str, given))}: expected at most {order} thresholds for order {order}, the first 0, "
            f"none smaller than the one before"
        )
    return given + given[-1:] * (order - len(given))


def _prune(counts, thresholds: Sequence[int]) -> None:
    """Forget n-grams after their probabilities are set.

    What begins or ends a longer one came at least as often, so with thresholds that do not fall it stays if that does.
    """
    for threshold, by_history in zip(thresholds[1:], counts.counts[1:], strict=True):
        for history, following in list(by_history.items()):
            for word in [word for word, count in following.word_to_count.items() if count <= threshold]:
                del following.word_to_count[word], following.word_to_f[word]
            if not following.word_to_count:
                del by_history[history]


def _with_unknown(arpa: str, num_unigrams: int, probability: float) -> str:
    """The ARPA text with an entry for `<unk>`, without which KenLM takes unknown words for impossible."""
    arpa = arpa.replace(f"ngram 1={num_unigrams}\n", f"ngram 1={num_unigrams + 1}\n", 1)
    return arpa.replace("\\1-grams:\n", f"\\1-grams:\n{math.log10(probability):.7f}\t<unk>\n", 1)


def vocabulary_path(path: Path) -> Path:
    """Where the word list of a model lies."""
    return path.with_suffix(".vocab.txt")


def load_unigrams(path: Path) -> list[str]:
    """The words of a language model: of an ARPA file (also gzipped), or of the list beside a KenLM binary.

    `<s>`, `</s>` and `<unk>` are left out.

    Raises:
      LMError: no such file, neither ARPA nor KenLM's, or a binary without its list.
    """
    try:
        with path.open("rb") as f:
            head = f.read(len(_BINARY_MAGIC))
        if head == _BINARY_MAGIC:
            return _listed_words(path)
        with gzip.open(path, "rt", encoding="utf-8") if head[:2] == b"\x1f\x8b" else path.open(encoding="utf-8") as f:
            words = _arpa_words(f)
    except FileNotFoundError:
        raise LMError(f"no language model {path}; build one with `jaxds2 lm build TEXT --out {path}`") from None
    except UnicodeDecodeError:
        raise LMError(
            f"{path}: neither an ARPA file (UTF-8 text) nor a KenLM binary, it begins with {head[:16]!r}; "
            f"build one with `jaxds2 lm build TEXT --out lm.arpa`"
        ) from None
    except (OSError, EOFError, zlib.error) as e:
        raise LMError(f"{path}: cannot be read ({_reason(e)})") from None
    if not words:
        raise LMError(f"{path}: holds no \\1-grams: section with words; expected an ARPA file or a KenLM binary")
    return words


def _arpa_words(lines: Iterable[str]) -> list[str]:
    words: list[str] = []
    inside = False
    for line in lines:
        if line.startswith("\\"):
            if inside:
                break
            inside = line.strip() == "\\1-grams:"
        elif inside and (fields := line.split()):
            words.append(fields[1] if len(fields) > 1 else "")
    return [word for word in words if word and word.lower() not in _MARKS]


def _listed_words(path: Path) -> list[str]:
    listed = vocabulary_path(path)
    if not listed.is_file():
        raise LMError(
            f"{path}: a KenLM binary keeps no list of its words, and there is no {listed} with them, one a line; "
            f"`jaxds2 lm build` writes one beside its ARPA file"
        )
    words = listed.read_text(encoding="utf-8").split()
    if not words:
        raise LMError(f"{listed}: holds no words; expected those of {path.name}, one a line")
    return [word for word in words if word.lower() not in _MARKS]


def load_model(path: Path) -> "kenlm.Model":
    """Load a model into KenLM, silently.

    Raises:
      LMError: kenlm is missing, or refuses the file.
    """
    try:
        import kenlm
    except ImportError:
        raise LMError(f"a language model needs kenlm: {INSTALL}") from None
    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    try:
        return kenlm.Model(str(path), config)
    except (OSError, RuntimeError, ValueError) as e:
        reason = _reason(e).rpartition("threw ")[2]  # behind the place in KenLM's C++
        raise LMError(f"{path}: KenLM cannot read it ({reason}); expected an ARPA file or a KenLM binary") from None


@dataclass(frozen=True)
class WordModel:
    """A language model of words, open, for one alphabet."""

    path: Path
    model: "kenlm.Model"
    words: list[str]
    """Those of its words that the alphabet can spell."""
    described: dict[str, Any]
    """For a report."""

    def log_prob(self, text: str) -> float:
        """log P(<s> text </s>), natural."""
        return self.model.score(text) * math.log(10)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing that a library in C++ writes to stderr in the block comes out, such as KenLM's bar over a text model."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def open_model(path: Path, vocabulary: Vocabulary) -> WordModel:
    """Load a language model and check that the alphabet spells its words.

    Raises:
      LMError: the file cannot be read, or more than half of its words cannot be spelled or are not its own.
    """
    words = load_unigrams(path)
    if " " not in vocabulary.characters:
        raise LMError(f"{path}: a model of words needs a space in the alphabet {vocabulary.characters!r}")
    spelled = [word for word in words if not vocabulary.unknown(word)]
    if 2 * len(spelled) < len(words):
        foreign = next(word for word in words if vocabulary.unknown(word))
        hint = "; write its words in lower case" if foreign.lower() != foreign else ""
        raise LMError(
            f"{path}: {len(words) - len(spelled)} of its {len(words)} words, such as {foreign!r}, cannot be spelled in "
            f"the alphabet {vocabulary.characters!r}: this is the language model of another vocabulary{hint}"
        )
    model = load_model(path)
    known = [word for word in spelled if word in model]
    if 2 * len(known) < len(spelled):
        raise LMError(
            f"{path}: knows {len(known)} of the {len(spelled)} words listed for it: the list is another model's"
        )
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    described = {"lm": str(path), "lm_sha256": digest, "lm_order": model.order, "lm_words": len(known)}
    described["lm_words_left_out"] = len(words) - len(known)
    return WordModel(path, model, known, described)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
