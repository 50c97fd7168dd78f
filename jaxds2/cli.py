"""The command line, `jaxds2 prepare | shard | check | train | eval | ...`: arguments, no logic.

Heavy modules are imported by the command that needs them, so that `--help` and a typo answer at once.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jaxds2.config import ConfigError, load_config, read_config

if TYPE_CHECKING:
    from jaxds2.decoding.decoder import DecoderChoice
    from jaxds2.decoding.hypothesis import Decoder
    from jaxds2.text import Vocabulary

FAILURE, WRONG_USE = 1, 2

MAX_SHARD_MB = 100_000
MIN_PAUSE, MAX_PAUSE = 0.2, 5.0

CORPORA = ("demo", "an4", "librispeech", "mini-librispeech", "common-voice", "ljspeech")
TRANSCRIPT_FORMATS = ("txt", "srt", "vtt", "tsv", "json")
LANGUAGE_MODELS = ("librispeech-3gram-pruned", "librispeech-3gram", "librispeech-4gram")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 wrong use, 75 stopped and resumable."""
    parser = _Parser(prog="jaxds2", description="Deep Speech 2 with parallel minGRU.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_prepare(commands.add_parser("prepare", help="turn a corpus into manifests"))
    add_shard(commands.add_parser("shard", help="pack a manifest and its audio into a few large files"))
    add_check(commands.add_parser("check", help="audit manifests or shards and their audio"))
    add_train(commands.add_parser("train", help="train a model (also: python train.py)"))
    add_eval(commands.add_parser("eval", help="word error rate of a run (also: python eval.py)"))
    add_lm(commands.add_parser("lm", help="n-gram language models"))
    add_align(commands.add_parser("align", help="where each word of known texts is spoken"))
    add_transcribe(commands.add_parser("transcribe", help="text of audio files"))
    add_digest(commands.add_parser("digest", help="checksum of a run's newest parameters"))
    add_demo(commands.add_parser("demo", help="prepare, train and evaluate the spoken demo corpus"))
    return run(parser, argv)


def train(argv: Sequence[str] | None = None) -> int:
    """`python train.py`."""
    parser = _Parser(prog="train.py", description="Train a model.")
    add_train(parser)
    return run(parser, argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """`python eval.py`."""
    parser = _Parser(prog="eval.py", description="Word and character error rate of a run.")
    add_eval(parser)
    return run(parser, argv)


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, call, and turn our own errors and the operating system's into one line."""
    arguments = _parse(parser, argv)
    command: Callable[[argparse.Namespace], int] = arguments.call
    try:
        return command(arguments)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return WRONG_USE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head`: nobody reads on
        return 0
    except (ValueError, OSError) as e:
        if not (isinstance(e, OSError) or type(e).__module__.startswith("jaxds2.")):
            raise  # a fault of ours: the traceback is wanted
        print(f"error: {e}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Names the nearest of the choices for one that is none, as configs do for fields."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message)
        if found and (near := difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1)):
            message += f"; did you mean {near[0]}?"
        super().error(message)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Options and section.field=value overrides in any order; argparse alone wants the overrides in one piece."""
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [a for a in rest if a.startswith("-") or "=" not in a or not hasattr(arguments, "overrides")]:
        options = re.findall(r"--[\w-]+", arguments.usage)
        near = [n for a in unknown for n in difflib.get_close_matches(a.partition("=")[0], options, n=1)]
        hint = f"; did you mean {' '.join(near)}?" if near else ""
        parser.usage = arguments.usage.removeprefix("usage: ").strip().replace("%", "%%")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _must_exist(*paths: Path | None) -> None:
    """A path on the command line that leads nowhere is wrong use."""
    for path in paths:
        if path is not None and not path.exists():
            raise ConfigError(f"{path} does not exist; correct the path")


def _check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: must be 1 or more")


def add_prepare(parser: argparse.ArgumentParser) -> None:
    """`jaxds2 prepare`."""
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("--source", type=Path, help="folder of the corpus in its original layout")
    parser.add_argument("--out", type=Path, help="folder for the manifests (default: data/CORPUS)")
    parser.add_argument("--download", action="store_true", help="fetch the official archives first")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="LibriSpeech: only these, e.g. train-clean-100")
    parser.add_argument("--seed", type=int, default=0, help="demo: seed of the corpus")
    parser.add_argument("--workers", type=int, help="demo: processes (default: one per core)")
    parser.set_defaults(call=_prepare, usage=parser.format_usage())


def _prepare(arguments: argparse.Namespace) -> int:
    from jaxds2.data import corpora

    _must_exist(None if arguments.download else arguments.source)
    corpus, out = arguments.corpus, arguments.out or Path("data") / arguments.corpus.replace("-", "_")
    if arguments.splits and corpus != "librispeech":
        raise ConfigError("--splits is for `prepare librispeech`")
    if corpus == "demo":
        if arguments.source or arguments.download:
            raise ConfigError("`prepare demo` speaks its own corpus; leave out --source and --download")
        if arguments.seed < 0:
            raise ConfigError(f"--seed {arguments.seed}: must be 0 or more")
        _check_workers(arguments.workers)
        from jaxds2.data.spoken import prepare_demo

        prepare_demo(out, seed=arguments.seed, workers=arguments.workers)
    else:
        source = arguments.source
        if arguments.download:
            source = corpora.download_corpus(corpus, source or out, arguments.splits)
        if source is None:
            raise ConfigError(f"say where {corpus} is with --source DIR, or fetch it with --download")
        if corpus == "an4":
            corpora.prepare_an4(source, out)
        elif corpus == "librispeech":
            corpora.prepare_librispeech(source, out, splits=arguments.splits)
        elif corpus == "mini-librispeech":
            corpora.prepare_mini_librispeech(source, out)
        elif corpus == "common-voice":
            corpora.prepare_common_voice(source, out)
        else:
            corpora.prepare_ljspeech(source, out)
    return 0


def add_shard(parser: argparse.ArgumentParser) -> None:
    """`jaxds2 shard`."""
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards and their index")
    parser.add_argument("--shard-size", type=float, default=256, metavar="MB", help="of a shard (default: 256)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.set_defaults(call=_shard, usage=parser.format_usage())


def _shard(arguments: argparse.Namespace) -> int:
    from jaxds2.data.shards import write_shards
    from jaxds2.stop import leaving_on_sigterm

    _must_exist(arguments.manifest)
    if not 1e-6 <= arguments.shard_size <= MAX_SHARD_MB:
        raise ConfigError(f"--shard-size {arguments.shard_size:g}: expected megabytes, up to {MAX_SHARD_MB}")
    _check_workers(arguments.workers)
    shard_bytes = round(arguments.shard_size * 1e6)
    with leaving_on_sigterm("stopped; the same command goes on"):
        write_shards(arguments.manifest, arguments.out, shard_bytes=shard_bytes, workers=arguments.workers)
    return 0


def add_check(parser: argparse.ArgumentParser) -> None:
    """`jaxds2 check`."""
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST")
    parser.add_argument("--config", type=Path, help="alphabet and subsampling to check against (default: the defaults)")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="for the findings (default: check.json beside the first manifest)",
    )
    parser.set_defaults(call=_check, usage=parser.format_usage())


def _check(arguments: argparse.Namespace) -> int:
    import json

    from jaxds2.config import Config, TrainingConfig
    from jaxds2.data.audit import audit
    from jaxds2.data.manifest import manifest_path
    from jaxds2.files import WriteError, write_whole
    from jaxds2.inference.recognizer import output_frames
    from jaxds2.text import Vocabulary

    _must_exist(*arguments.manifests)
    config = load_config(arguments.config) if arguments.config else Config("check", training=TrainingConfig(steps=1))
    result = audit(
        arguments.manifests,
        vocabulary=Vocabulary(config.data.characters),
        features=config.features,
        output_frames=lambda num_samples: output_frames(num_samples, config),
    )
    print(result.render())
    found = arguments.json or manifest_path(arguments.manifests[0]).parent / "check.json"
    try:
        write_whole(found, json.dumps(result.to_dict(), indent=2) + "\n")
        print(f"written to {found}")
    except WriteError as e:
        if arguments.json:
            raise
        print(f"{e}; --json FILE says where else to write the findings", file=sys.stderr)
    return FAILURE if result.errors else 0


def add_train(parser: argparse.ArgumentParser) -> None:
    """`jaxds2 train`."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="e.g. configs/an4.py")
    parser.add_argument("--run", type=Path, metavar="DIR", help="folder of the run (default: runs/NAME of the config)")
    parser.add_argument("--init-from", metavar="RUN", help="start from the weights of another run")
    parser.add_argument("--dry-run", action="store_true", help="parameters, shapes, FLOPs and memory; no training")
    add_processes(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.set_defaults(call=_train, usage=parser.format_usage())


def _train(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if arguments.init_from:
        overrides.append(f"training.init_from={arguments.init_from}")
    config = load_config(arguments.config, overrides)
    if arguments.dry_run:
        from jaxds2.training.dryrun import dry_run

        print(dry_run(config).render())
        return 0
    from jaxds2.allocator import keep_pages, on_cpus
    from jaxds2.stop import leaving_on_sigterm

    if on_cpus():  # for an accelerator XLA compiles with many threads, which would wait for each other at the one heap
        keep_pages()
    with leaving_on_sigterm("stopped before training; the same command starts again"), _joined(arguments):
        from jaxds2.training.loop import train as train_run

        return train_run(config, arguments.run or Path("runs") / config.name)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Options of a command that several processes may do together."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="several processes: where process 0 listens")
    parser.add_argument("--processes", type=int, metavar="N", help="several processes: how many")
    parser.add_argument("--process", type=int, metavar="I", help="several processes: which one this is, from 0")
    parser.add_argument(
        "--join-timeout", type=int, default=300, metavar="SECONDS", help="wait so long for the others (default: 300)"
    )


def _joined(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """Together with the other processes of a run, where there are any."""
    from jaxds2.hosts import find_cluster, join

    cluster = find_cluster(
        os.environ,
        coordinator=arguments.coordinator,
        processes=arguments.processes,
        process=arguments.process,
    )
    return nullcontext() if cluster is None else join(cluster, timeout_s=arguments.join_timeout)


def add_run(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Options that choose a model."""
    parser.add_argument("--run", type=Path, required=required, metavar="DIR", help="folder of the run")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|STEP", help="default: best")


def add_decoder(parser: argparse.ArgumentParser, *, run_required: bool = True) -> None:
    """Options that choose a model and a decoder."""
    add_run(parser, required=run_required)
    parser.add_argument("--decoder", choices=("greedy", "beam"), default="greedy")
    beam = parser.add_argument_group("beam search", "defaults where neither these options nor RUN/decoding.json say")
    add_search(beam)
    beam.add_argument("--alpha", type=float, help="weight of the language model (default: 0.5)")
    beam.add_argument("--beta", type=float, help="bonus per word (default: 1.0)")
    beam.add_argument("--beam-width", type=int, help="hypotheses kept (default: 100)")
    beam.add_argument("--beam-prune-logp", type=float, metavar="NATS", help="below the best: dropped (default: -10)")
    beam.add_argument("--token-min-logp", type=float, metavar="NATS", help="below this: not tried (default: -5)")
    beam.add_argument("--hot-words", metavar="FILE|WORD:WEIGHT,...", help="words with a bonus in nats")
    beam.add_argument("--lexicon", type=Path, metavar="FILE", help="flashlight: words to choose from, one a line")


def add_search(parser: argparse._ActionsContainer) -> None:
    """Options of a beam search that tuning shares."""
    parser.add_argument("--lm", type=Path, metavar="FILE", help="n-gram model, ARPA or KenLM binary")
    parser.add_argument(
        "--backend", choices=("pyctcdecode", "flashlight", "ctc-beam-decoder"), help="default: pyctcdecode"
    )
    parser.add_argument(
        "--blank-threshold",
        type=float,
        metavar="P",
        help="of a run of frames with more blank than this one is searched",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Of a command that decodes a whole set."""
    parser.add_argument(
        "--decode-workers", type=int, default=0, metavar="N", help="processes that decode (default: 0, this one)"
    )


def _checkpoint(text: str) -> str | int:
    if text in ("best", "last"):
        return text
    if not text.isdecimal():
        raise ConfigError(f"--checkpoint {text}: expected best, last or a step")
    return int(text)


def _note(line: str) -> None:
    """Say it once, even where several processes run the command."""
    import jax

    if jax.process_index() == 0:
        print(line, file=sys.stderr)


def _decoder_choice(arguments: argparse.Namespace, characters: str) -> "DecoderChoice":
    """The decoder that the options and the run's tuned settings describe."""
    from jaxds2.decoding.decoder import DecoderChoice, read_hot_words
    from jaxds2.decoding.settings import BeamSettings
    from jaxds2.decoding.tuned import FILE, SETTINGS, settle, unused
    from jaxds2.text import Vocabulary

    explicit = {name: getattr(arguments, name, None) for name in SETTINGS}
    asked = getattr(arguments, "nbest", None)
    nbest = 1 if asked is None else asked
    if arguments.decoder == "greedy":
        _only_for_beam(arguments)
        return DecoderChoice()
    _must_exist(arguments.lm, arguments.lexicon)
    backend = arguments.backend or "pyctcdecode"
    values, sources = settle(explicit, arguments.run, backend, arguments.lm)
    if tuned := [f"{name} {values[name]}" for name in SETTINGS if sources[name] == FILE]:
        _note(f"tuned settings of {arguments.run / FILE}: {', '.join(tuned)}")
    elif line := unused(arguments.run, backend, arguments.lm):
        _note(line)
    threshold = values.pop("blank_threshold")
    hot_words = read_hot_words(arguments.hot_words, Vocabulary(characters)) if arguments.hot_words else ()
    return DecoderChoice(
        "beam",
        backend,
        lm=arguments.lm,
        lexicon=arguments.lexicon,
        blank_threshold=threshold,
        beam=BeamSettings(**values, hot_words=hot_words, nbest=nbest),
        sources=sources | {"backend": "command line" if arguments.backend else "default"},
    )


def _only_for_beam(arguments: argparse.Namespace) -> None:
    """Raises ConfigError: an option of a beam search is given for greedy decoding."""
    from jaxds2.decoding.tuned import SETTINGS

    names = (*SETTINGS, "lm", "backend", "lexicon", "hot_words")
    if given := [name for name in names if getattr(arguments, name) is not None]:
        raise ConfigError(f"--{given[0].replace('_', '-')} is for --decoder beam")
    if (nbest := getattr(arguments, "nbest", None)) not in (None, 1):
        raise ConfigError(f"--nbest {nbest}: greedy decoding has one hypothesis; take --decoder beam")


def _made(choice: "DecoderChoice", vocabulary: "Vocabulary") -> "Decoder":
    """The decoder; what it leaves out of its language model is said."""
    from jaxds2.decoding.decoder import make_decoder

    decoder = make_decoder(choice, vocabulary)
    if left_out := decoder.settings.get("lm_words_left_out"):
        _note(
            f"{choice.lm}: {left_out:,} of its {decoder.settings['lm_words'] + left_out:,} words are left out: the "
            f"alphabet {vocabulary.characters!r} cannot spell them, or the model does not know them"
        )
    return decoder


def add_eval(parser: argparse.ArgumentParser) -> None:
    """`jaxds2 eval`."""
    add_decoder(parser, run_required=False)
    parser.add_argument(
        "--manifest", type=Path, metavar="FILE", help="or a folder of shards (default: data.test of the config)"
    )
    parser.add_argument("--name", help="folder under DIR/eval (default: manifest folder, its name, decoder)")
    add_workers(parser)
    parser.add_argument("--nbest", type=int, metavar="N", help="also write nbest.jsonl, N hypotheses an utterance")
    parser.add_argument("--save-logprobs", action="store_true", help="keep the log-probabilities in the folder too")
    parser.add_argument(
        "--logprobs", type=Path, metavar="EVAL_DIR", help="decode those that --save-logprobs kept, without the model"
    )
    parser.add_argument("--no-html", action="store_true", help="leave out report.html, with its sound and pictures")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar="EVAL_DIR",
        help="instead: is the difference between two scores of one manifest more than chance?",
    )
    add_processes(parser)
    parser.set_defaults(call=_eval, usage=parser.format_usage())


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.compare:
        return _compare(arguments)
    if arguments.run is None:
        raise ConfigError("--run DIR says which run to score (or --compare which two scores to compare)")
    if arguments.decoder == "greedy":
        _only_for_beam(arguments)
    if not arguments.logprobs:
        with _joined(arguments):
            return _score(arguments)
    if arguments.coordinator or arguments.processes or arguments.process is not None:
        raise ConfigError("--logprobs decodes in one process; leave out --coordinator, --processes and --process")
    _must_exist(arguments.logprobs)
    if arguments.save_logprobs:
        raise ConfigError("--logprobs and --save-logprobs: they are kept already")
    if arguments.checkpoint != "best":
        raise ConfigError(f"--logprobs are of a checkpoint already; leave out --checkpoint {arguments.checkpoint}")
    return _score(arguments)


def _score(arguments: argparse.Namespace) -> int:
    from functools import partial

    from jaxds2.data.shards import read_utterances
    from jaxds2.decoding.decoder import make_decoder
    from jaxds2.decoding.pool import open_pool
    from jaxds2.evaluation.evaluate import EvaluationError, references_of
    from jaxds2.evaluation.logprobs import read_log_probs
    from jaxds2.evaluation.report import score_log_probs, score_run
    from jaxds2.inference.recognizer import Recognizer
    from jaxds2.text import Vocabulary

    config = read_config(arguments.run / "config.json")
    saved = read_log_probs(arguments.logprobs) if arguments.logprobs else None
    manifests = _manifests_to_score(arguments, [Path(saved.manifest)] if saved else [Path(m) for m in config.data.test])
    names = [arguments.name or _name_of_set(manifest) for manifest in manifests]
    if len(set(names)) < len(names):
        together = ", ".join(map(str, manifests))
        raise ConfigError(f"{together}: their scores would go by one name; score each with --manifest and --name")
    vocabulary = Vocabulary(saved.characters if saved else config.data.characters)
    choice = _decoder_choice(arguments, vocabulary.characters)
    decoder = _made(choice, vocabulary)
    kind = choice.name if choice.backend == "pyctcdecode" else choice.backend
    kind += "-lm" if choice.lm else ""
    for manifest in manifests:  # one without any is refused before the model is loaded
        try:
            references_of(read_utterances(manifest), vocabulary)
        except EvaluationError as e:
            raise EvaluationError(f"{manifest}: {e}") from None
    score: Callable[..., object]
    if saved:
        score = partial(score_log_probs, saved, arguments.logprobs, config)
    else:
        recognizer = Recognizer.load(arguments.run, _checkpoint(arguments.checkpoint))
        score = partial(score_run, recognizer, checkpoint=arguments.checkpoint, save_log_probs=arguments.save_logprobs)
    with open_pool(partial(make_decoder, choice, vocabulary), arguments.decode_workers) as pool:
        for manifest, name in zip(manifests, names, strict=True):
            score(
                manifest=manifest,
                decoder=decoder,
                folder=arguments.run / "eval" / (arguments.name or f"{name}-{kind}"),
                run_dir=arguments.run,
                page=not arguments.no_html,
                pool=pool,
                list_hypotheses=arguments.nbest is not None,
            )
    return 0


def _manifests_to_score(arguments: argparse.Namespace, otherwise: list[Path]) -> list[Path]:
    manifests = [arguments.manifest] if arguments.manifest else otherwise
    if not manifests:
        raise ConfigError(f"the config of {arguments.run} names no test manifest (data.test); give one with --manifest")
    if arguments.name and len(manifests) > 1:
        raise ConfigError(f"--name is for one manifest, the config of {arguments.run} names {len(manifests)}")
    if arguments.name and (Path(arguments.name).name != arguments.name or arguments.name == ".."):
        raise ConfigError(
            f"--name {arguments.name}: expected the name of a folder in {arguments.run / 'eval'}, no path"
        )
    _must_exist(arguments.manifest)
    for manifest in manifests:
        if not manifest.exists():
            raise ConfigError(
                f"{manifest}, a test manifest of {arguments.run / 'config.json'}, does not exist; write it with "
                f"`jaxds2 prepare`, or name another with --manifest"
            )
    return manifests


def _name_of_set(manifest: Path) -> str:
    """Corpus and set: an4-test of data/an4/test.jsonl, and of the shards in data/an4/shards/test."""
    from jaxds2.data.manifest import INDEX, manifest_path, set_name

    path = manifest_path(manifest).absolute()
    corpus = path.parent.parent if path.name == INDEX else path.parent
    return f"{corpus.parent.name if corpus.name == 'shards' else corpus.name}-{set_name(path)}"


def _compare(arguments: argparse.Namespace) -> int:
    from jaxds2.evaluation.comparison import compare

    parser = argparse.ArgumentParser()
    add_eval(parser)
    others = [
        f"--{name.replace('_', '-')}"
        for name, value in vars(arguments).items()
        if name not in ("compare", "command", "call", "usage") and value != parser.get_default(name)
    ]
    if others:
        raise ConfigError(f"--compare reads two scores that are there already; leave out {' '.join(others)}")
    _must_exist(*arguments.compare)
    print(compare(*arguments.compare).render())
    return 0


def add_lm(parser: argparse.ArgumentParser) -> None:
    """`jaxds2 lm`."""
    commands = parser.add_subparsers(dest="lm_command", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="an ARPA n-gram model from text")
    build.add_argument(
        "text", type=Path, nargs="+", metavar="TEXT", help="plain text, a sentence a line, or a manifest"
    )
    build.add_argument("--order", type=int, default=3, help="longest n-gram (default: 3)")
    build.add_argument("--out", type=Path, required=True, metavar="FILE", help="the ARPA file to write")
    build.add_argument(
        "--prune", type=int, nargs="+", default=(), metavar="COUNT", help="per order: n-grams so rare are left out"
    )
    build.add_argument(
        "--estimator",
        choices=("kaldingram", "lmplz"),
        help="lmplz: KenLM's program; kaldingram: the same file everywhere (default: lmplz where it is on the PATH)",
    )
    build.add_argument(
        "--binary",
        action=argparse.BooleanOptionalAction,
        help="also FILE.binary, by KenLM's build_binary (default: where it is on the PATH)",
    )
    add_alphabet(build)
    build.set_defaults(call=_lm_build, usage=build.format_usage())
    perplexity = commands.add_parser("perplexity", help="how well a model foresees texts")
    perplexity.add_argument("lm", type=Path, metavar="LM", help="ARPA file or KenLM binary")
    perplexity.add_argument("text", type=Path, nargs="+", metavar="TEXT", help="as for build")
    perplexity.add_argument("--sentences", action="store_true", help="also of each: perplexity, unknown words, text")
    add_alphabet(perplexity)
    perplexity.set_defaults(call=_lm_perplexity, usage=perplexity.format_usage())
    download = commands.add_parser("download", help="a published model: LibriSpeech's, from openslr.org/11")
    download.add_argument("name", choices=LANGUAGE_MODELS)
    download.add_argument("--out", type=Path, default=Path("data/lm"), metavar="DIR", help="default: data/lm")
    download.set_defaults(call=_lm_download, usage=download.format_usage())
    tune = commands.add_parser("tune", help="search the weights and the pruning of beam search on a development set")
    tune.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the run")
    tune.add_argument("--checkpoint", default="best", metavar="best|last|STEP", help="default: best")
    tune.add_argument("--manifest", type=Path, metavar="DEV", help="what to tune on (default: data.dev of the config)")
    tune.add_argument(
        "--logprobs", type=Path, metavar="EVAL_DIR", help="its log-probabilities, as --save-logprobs kept"
    )
    add_search(tune)
    add_workers(tune)
    tune.set_defaults(call=_lm_tune, usage=tune.format_usage())


def add_alphabet(parser: argparse.ArgumentParser) -> None:
    """Options that say how text is normalised."""
    parser.add_argument("--run", type=Path, metavar="DIR", help="normalise by the alphabet of this run")
    parser.add_argument("--characters", help="or by this one (default: that of the configs)")


def _alphabet(arguments: argparse.Namespace) -> "Vocabulary":
    from jaxds2.config import DataConfig
    from jaxds2.text import Vocabulary

    if arguments.run is None:
        return Vocabulary(arguments.characters or DataConfig().characters)
    if arguments.characters:
        raise ConfigError("--run and --characters both say the alphabet; leave out one")
    return Vocabulary(read_config(arguments.run / "config.json").data.characters)


def _lm_build(arguments: argparse.Namespace) -> int:
    from jaxds2.decoding.kenlm_tools import build_binary, estimate_by_lmplz, is_installed
    from jaxds2.decoding.lm import MAX_ORDER, MIN_ORDER, build_ngram, read_text

    _must_exist(*arguments.text)
    if not MIN_ORDER <= arguments.order <= MAX_ORDER:
        raise ConfigError(f"--order {arguments.order}: KenLM reads models of order {MIN_ORDER} to {MAX_ORDER}")
    if any(arguments.out.exists() and arguments.out.samefile(path) for path in arguments.text):
        raise ConfigError(f"--out {arguments.out} is one of the texts, which it would replace; name another file")
    text = read_text(arguments.text, _alphabet(arguments))
    if (remark := text.remark()) and len(text.foreign) == text.words:
        raise ConfigError(remark)
    if remark:
        print(f"warning: {remark}", file=sys.stderr)
    estimator = arguments.estimator or ("lmplz" if is_installed("lmplz") else "kaldingram")
    estimate = estimate_by_lmplz if estimator == "lmplz" else build_ngram
    lm = estimate(text.sentences, arguments.out, order=arguments.order, prune=arguments.prune)
    pruned = f", pruned {' '.join(map(str, arguments.prune))}" if arguments.prune else ""
    print(f"wrote {lm}: {arguments.order}-grams of {len(text.sentences):,} sentences by {estimator}{pruned}")
    if is_installed("build_binary") if arguments.binary is None else arguments.binary:
        print(f"wrote {build_binary(lm)}")
    return 0


def _lm_perplexity(arguments: argparse.Namespace) -> int:
    from jaxds2.decoding.lm import load_model, read_text
    from jaxds2.decoding.perplexity import perplexity

    _must_exist(arguments.lm, *arguments.text)
    vocabulary = _alphabet(arguments)
    model = load_model(arguments.lm)
    for path in arguments.text:
        corpus = perplexity(model, read_text([path], vocabulary).sentences)
        for s in corpus.sentences if arguments.sentences else ():
            print(f"{s.perplexity:.2f}\t{s.unknown}\t{s.text}")
        print(f"{path}: {corpus.render()}")
        if 2 * corpus.unknown > corpus.words:
            print(
                f"warning: {path}: {arguments.lm} does not know most of its words, so both figures say little",
                file=sys.stderr,
            )
    return 0


def _lm_download(arguments: argparse.Namespace) -> int:
    from jaxds2.decoding.published import download_model

    print(f"wrote {download_model(arguments.name, arguments.out)}")
    return 0


def _lm_tune(arguments: argparse.Namespace) -> int:
    from jaxds2.evaluation.tuning import tune_run

    if arguments.lm is None:
        raise ConfigError("--lm FILE says which language model to tune the weight of")
    _must_exist(arguments.lm, arguments.manifest)
    config = read_config(arguments.run / "config.json")
    dev = Path(config.data.dev) if config.data.dev else None
    if arguments.manifest is None and arguments.logprobs is None and dev is None:
        raise ConfigError(
            f"the config of {arguments.run} names no development set (data.dev); give one with --manifest"
        )
    if arguments.manifest is None and arguments.logprobs is None:
        _must_exist(dev)
    tune_run(
        arguments.run,
        config,
        arguments.manifest or (None if arguments.logprobs else dev),
        lm=arguments.lm,
        backend=arguments.backend or "pyctcdecode",
        blank_threshold=arguments.blank_threshold,
        checkpoint=_checkpoint(arguments.checkpoint),
        log_probs=arguments.logprobs,
        workers=arguments.decode_workers,
    )
    return 0


def add_align(parser: argparse.ArgumentParser) -> None:
    """`jaxds2 align`."""
    add_run(parser)
    parser.add_argument(
        "--manifest", type=Path, required=True, metavar="FILE", help="audio and texts; or a folder of shards"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/align/, manifest folder and its name")
    parser.add_argument(
        "--min-score", type=float, metavar="NATS", help="list utterances that score lower (default: -1; 0 is best)"
    )
    parser.set_defaults(call=_align, usage=parser.format_usage())


def _align(arguments: argparse.Namespace) -> int:
    from jaxds2.inference.align import MIN_SCORE, align_run
    from jaxds2.inference.recognizer import Recognizer

    _must_exist(arguments.manifest)
    if arguments.min_score is not None and not arguments.min_score <= 0:
        raise ConfigError(f"--min-score {arguments.min_score:g}: expected 0 or less, the score of a text that fits")
    failed = align_run(
        Recognizer.load(arguments.run, _checkpoint(arguments.checkpoint)),
        arguments.manifest,
        folder=arguments.out or arguments.run / "align" / _name_of_set(arguments.manifest),
        min_score=MIN_SCORE if arguments.min_score is None else arguments.min_score,
    )
    return FAILURE if failed else 0


def add_transcribe(parser: argparse.ArgumentParser) -> None:
    """`jaxds2 transcribe`."""
    add_decoder(parser)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="recordings, folders of them, or - (stdin)")
    parser.add_argument(
        "--format", choices=(*TRANSCRIPT_FORMATS, "all"), default="txt", help="default: txt; all needs --out"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for a file a recording (default: standard output)"
    )
    parser.add_argument("--word-times", action="store_true", help="times of each word; srt, vtt: a cue a word")
    parser.add_argument(
        "--pause",
        type=float,
        metavar="SECONDS",
        help="of silence, parts a file over 30 s or with 1.2 s of silence inside (default: 0.4; 0.2 to 5)",
    )
    parser.set_defaults(call=_transcribe, usage=parser.format_usage())


def _transcribe(arguments: argparse.Namespace) -> int:
    from jaxds2.inference.recordings import check_names, find_recordings

    every = arguments.format == "all"
    if every and arguments.out is None:
        raise ConfigError(f"--format all writes {len(TRANSCRIPT_FORMATS)} files a recording; say where with --out DIR")
    if arguments.pause is not None and not MIN_PAUSE <= arguments.pause <= MAX_PAUSE:
        raise ConfigError(f"--pause {arguments.pause:g}: expected seconds, {MIN_PAUSE:g} to {MAX_PAUSE:g}")
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise ConfigError(f"--out {arguments.out}: not a folder")
    read_config(arguments.run / "config.json")  # is it a run? Before a long search
    with find_recordings(arguments.files, sys.stdin) as (recordings, faults):
        if arguments.out is not None:
            check_names(recordings)
        elif len(recordings) > 1 and arguments.format not in ("txt", "json"):
            raise ConfigError(
                f"--format {arguments.format} of {len(recordings)} recordings: write them to files with --out DIR"
            )
        from jaxds2.inference.recognizer import Recognizer
        from jaxds2.inference.transcribe import transcribe_run
        from jaxds2.inference.windows import PAUSE_SECONDS

        recognizer = Recognizer.load(arguments.run, _checkpoint(arguments.checkpoint))
        failed = transcribe_run(
            recognizer,
            recordings,
            _made(_decoder_choice(arguments, recognizer.vocabulary.characters), recognizer.vocabulary),
            forms=TRANSCRIPT_FORMATS if every else (arguments.format,),
            word_times=arguments.word_times,
            folder=arguments.out,
            pause=PAUSE_SECONDS if arguments.pause is None else arguments.pause,
            faults=faults,
        )
    return FAILURE if failed else 0


def add_digest(parser: argparse.ArgumentParser) -> None:
    """`jaxds2 digest`."""
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.set_defaults(call=_digest, usage=parser.format_usage())


def _digest(arguments: argparse.Namespace) -> int:
    from jaxds2.training.checkpoint import Checkpoints, digest

    read_config(arguments.run / "config.json")  # is it a run?
    with Checkpoints(arguments.run / "checkpoints") as checkpoints:
        step = checkpoints.resolve("last")
        print(digest(*checkpoints.restore_weights(step)), step)
    return 0


def add_demo(parser: argparse.ArgumentParser) -> None:
    """`jaxds2 demo`, which `make demo` calls."""
    parser.add_argument("--config", type=Path, default=Path("configs/demo.py"), metavar="FILE")
    parser.add_argument("--run", type=Path, metavar="DIR", help="folder of the run (default: runs/NAME of the config)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.set_defaults(call=_demo, usage=parser.format_usage())


def _demo(arguments: argparse.Namespace) -> int:
    from jaxds2.demo import demo

    config = load_config(arguments.config, arguments.overrides)
    return demo(config, arguments.run or Path("runs") / config.name)
