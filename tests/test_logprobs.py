import json
from dataclasses import replace

import numpy as np
import pytest

from jaxds2.data.manifest import Utterance
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.evaluation.evaluate import EvaluationError, evaluate_log_probs
from jaxds2.evaluation.logprobs import LogProbs, LogProbsError, check_same, read_log_probs, write_log_probs
from jaxds2.text import Vocabulary


@pytest.fixture
def saved():
    rng = np.random.default_rng(0)
    return LogProbs(
        ids=("b", "a", "ü"),
        log_probs=tuple(np.log(rng.dirichlet(np.ones(4), size=n)).astype(np.float32) for n in (3, 1, 7)),
        characters="ab ",
        manifest="data/x/dev.jsonl",
        manifest_sha256="ab" * 32,
        run="runs/x",
        checkpoint="best",
        checkpoint_step=70,
    )


def test_what_was_written_is_read_to_the_bit(saved, tmp_path):
    write_log_probs(tmp_path / "eval", saved)
    read = read_log_probs(tmp_path / "eval")
    assert read.ids == saved.ids
    assert read.origin() == saved.origin()
    assert all(np.array_equal(a, b) for a, b in zip(read.log_probs, saved.log_probs, strict=True))
    assert {a.dtype for a in read.log_probs} == {np.dtype(np.float32)}


def test_no_utterances_are_none(saved, tmp_path):
    write_log_probs(tmp_path, replace(saved, ids=(), log_probs=()))
    assert read_log_probs(tmp_path).log_probs == ()


def test_what_is_missing_or_damaged_is_refused(saved, tmp_path):
    with pytest.raises(LogProbsError, match=r"holds no log-probabilities .* --save-logprobs"):
        read_log_probs(tmp_path)
    write_log_probs(tmp_path, saved)
    content = bytearray((tmp_path / "logprobs.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "logprobs.npy").write_bytes(content)
    with pytest.raises(LogProbsError, match=r"logprobs\.npy: not the file that logprobs\.json describes, or damaged"):
        read_log_probs(tmp_path)
    index = json.loads((tmp_path / "logprobs.json").read_text())
    (tmp_path / "logprobs.json").write_text(json.dumps(index | {"schema_version": 9}))
    with pytest.raises(LogProbsError, match="schema version 9, expected 1"):
        read_log_probs(tmp_path)
    write_log_probs(tmp_path, saved)
    index = json.loads((tmp_path / "logprobs.json").read_text())
    damaged = (
        ([], "schema version None, expected 1"),
        ({k: v for k, v in index.items() if k != "sha256"}, "not as --save-logprobs writes it; write it again"),
        (index | {"utterances": ["b"]}, "not as --save-logprobs writes it; write it again"),
        (index | {"utterances": index["utterances"][1:]}, r"names 8 frames, logprobs\.npy holds 11; write both again"),
    )
    for content, message in damaged:
        (tmp_path / "logprobs.json").write_text(json.dumps(content))
        with pytest.raises(LogProbsError, match=rf"logprobs\.json: {message}"):
            read_log_probs(tmp_path)
    (tmp_path / "logprobs.json").write_text("{")
    with pytest.raises(LogProbsError, match=r"logprobs\.json: cannot be read"):
        read_log_probs(tmp_path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"characters": "abc "}, r"over the alphabet 'ab ', the run's is 'abc ': they are another run's \(runs/x\)"),
        ({"manifest_sha256": "cd" * 32}, r"of data/x/dev\.jsonl as it was .*abababababab.*cdcdcdcdcdcd"),
        ({"ids": ("a", "b", "ü")}, "this manifest is another"),
    ],
)
def test_of_another_alphabet_or_manifest_they_are_refused(saved, asked, message):
    same = {"characters": "ab ", "ids": saved.ids, "manifest_sha256": "ab" * 32, "where": "eval/x"}
    check_same(saved, **same)
    with pytest.raises(LogProbsError, match="^eval/x: log-probabilities .*" + message):
        check_same(saved, **(same | asked))


def test_nothing_is_scored_where_an_utterance_has_no_frames_or_none_a_reference(saved, tmp_path):
    vocabulary = Vocabulary(saved.characters)
    utterances = [Utterance(i, tmp_path / f"{i}.wav", 1.0, text) for i, text in zip(saved.ids, "ab ", strict=True)]
    decode = GreedyDecoder(vocabulary)
    assert len(evaluate_log_probs(saved.log_probs, utterances, vocabulary, decode, progress=False).hyps) == 3
    empty = (*saved.log_probs[:2], saved.log_probs[2][:0])
    with pytest.raises(EvaluationError, match="1 of 3 recordings cannot be scored: ü: too short for one frame"):
        evaluate_log_probs(empty, utterances, vocabulary, decode, progress=False)
    mute = [replace(u, text=" ") for u in utterances]
    with pytest.raises(EvaluationError, match="none of 3 utterances has a reference text"):
        evaluate_log_probs(saved.log_probs, mute, vocabulary, decode, progress=False)
