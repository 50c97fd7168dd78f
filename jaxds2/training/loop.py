"""train(): from a config to a trained run, resumable at any step."""

import contextlib
import dataclasses
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

import jaxds2
from jaxds2 import ctc_kernel, hosts
from jaxds2.compiler import compiler_options
from jaxds2.config import Config, ConfigError, describe, differences, read_config, save_config
from jaxds2.data.manifest import manifest_digest
from jaxds2.data.pipeline import LoadedBatch, PipelineError, load_batches
from jaxds2.data.placement import data_mesh, distribute, place, rows_of, shardings_of
from jaxds2.data.plan import BatchPlan
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.evaluation.evaluate import EvaluationError, Interrupted, evaluate
from jaxds2.inference.recognizer import Recognizer, compute_dtype
from jaxds2.lock import FolderLock
from jaxds2.model import mingru_kernel, scan
from jaxds2.model.deepspeech2 import Params, create
from jaxds2.stop import STOPPED, StopSignal
from jaxds2.text import Vocabulary
from jaxds2.training.checkpoint import CheckpointError, Checkpoints
from jaxds2.training.compilation import (
    OutOfMemoryError,
    compile_ahead,
    compile_shape,
    free_bytes,
    is_out_of_memory,
    keep_compiled,
    out_of_memory,
    shapes_ahead,
    temporary_bytes,
)
from jaxds2.training.monitor import Monitor
from jaxds2.training.optimizer import make_optimizer
from jaxds2.training.selection import num_updates, read_dev_data, read_training_data, training_plan
from jaxds2.training.step import (
    BatchLoss,
    TrainState,
    accumulate,
    make_eval_step,
    make_gradient_step,
    make_update_step,
    to_tree,
)
from jaxds2.training.step_report import StepReport, TrainingError
from jaxds2.training.watchdog import Watchdog

FINISHED = 0
"""Exit code: trained to the end."""

IDS_SHOWN = 5
"""Of utterances that are left out, on the console."""

MAY_CHANGE = {
    "data.workers",
    "data.train",
    "data.dev",
    "data.test",
    "data.durations",
    "training.devices",
    "training.fsdp",
    "training.log_every",
    "training.checkpoint_every",
    "training.max_skipped",
    "training.watchdog_seconds",
}
"""Fields in which a resumed run may differ from its start: none of them changes what is learnt. Of manifests, which may
have been packed into shards or moved since, the digests must stay."""


def train(config: Config, run_dir: Path, *, progress: bool = True) -> int:
    """Train a run to its end, from its newest checkpoint where it has one.

    The same call resumes a stopped run and ends in the same parameters, to the bit, as one that never stopped.

    Args:
      config: the whole configuration.
      run_dir: folder of the run; made if it is not there.
      progress: show a bar.

    Returns:
      0 when trained to the end, 75 when stopped by SIGINT or SIGTERM with everything saved.

    Raises:
      ConfigError, ManifestError, ShardError, AudioError, TextError, LockError, HostsError: it cannot start, one line
        each.
      TrainingError, PipelineError, EvaluationError: it cannot go on; the last good state is saved.
      OutOfMemoryError: it cannot go on; the last checkpoint is intact, or made now where it was not a step that failed.
      CheckpointError, MonitorError, WriteError: it cannot read or write the run; the last good checkpoint is intact.
    """
    number, several = jax.process_index(), jax.process_count() > 1
    stacks = run_dir / (f"stacks-{number}.txt" if number else "stacks.txt")

    def say(line: str) -> None:
        print(f"process {number}: {line}" if several else line, file=sys.stderr, flush=True)

    watchdog = Watchdog(config.training.watchdog_seconds, stacks, say)
    with FolderLock(run_dir, does="trains", option="--run") as lock, watchdog:
        hosts.agree(_start(config, run_dir))
        with Checkpoints(run_dir / "checkpoints") as checkpoints:
            return _train(config, run_dir, lock, checkpoints, watchdog, progress)


def _start(config: Config, run_dir: Path) -> dict[str, Any]:
    """What all processes of a run must have in common before they open its checkpoints."""
    folder = run_dir / "checkpoints"
    return {
        "code": hosts.code_version(),
        "jax": jax.__version__,
        "devices": f"{jax.local_device_count()} {jax.default_backend()}",
        "run": str(run_dir.absolute()),
        "checkpoints": sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "nothing",
        **{
            f"{section}.{name}": value
            for section, fields in dataclasses.asdict(config).items()
            if isinstance(fields, dict)
            for name, value in fields.items()
        },
    }


def _train(
    config: Config, run_dir: Path, lock: FolderLock, checkpoints: Checkpoints, watchdog: Watchdog, progress: bool
) -> int:
    writes = jax.process_index() == 0
    source = None
    if config.training.init_from is not None and checkpoints.last() is None:
        source = init_run(config.training.init_from)
    vocabulary = Vocabulary(config.data.characters)
    mesh = data_mesh(config.training.devices, rows_multiple=config.data.rows_multiple, fsdp=config.training.fsdp)
    platform = mesh.devices.flat[0].platform
    keep_compiled(platform)
    utterances, left_out = read_training_data(config, vocabulary)
    dev = read_dev_data(config, vocabulary)
    plan = training_plan(config, utterances, vocabulary)
    digest = manifest_digest(utterances)
    total_steps, batches_per_step = num_updates(config, plan), config.training.accumulate
    dev_digest = manifest_digest(dev)
    hosts.agree({"digest of the training manifests": digest, "digest of the dev manifest": dev_digest})
    seed, ema_decay = config.training.seed, config.training.ema_decay
    apply, params = create(
        config.features.n_mels, vocabulary.size, config.model, dtype=compute_dtype(config), seed=seed
    )
    renewed: list[str] = []
    if source is not None:
        params, renewed = initial_params(source, params, vocabulary.characters)
    if writes:  # from here on; what refuses to start has left nothing behind
        lock.take()
    before = read_config(run_dir / "config.json") if checkpoints.last() is not None else config
    require_same_training(before, config, run_dir)
    set_aside = checkpoints.set_aside_damaged()
    first_step = hosts.gather(checkpoints.last() or 0)[0]  # a shared folder may look older to another process
    resumed = checkpoints.read_meta(first_step) if first_step else {}
    for what, field, now, moved in (
        ("training manifests are", "manifest_digest", digest, before.data.train != config.data.train),
        ("dev manifest is", "dev_digest", dev_digest, before.data.dev != config.data.dev),
    ):
        if resumed.get(field, None if moved else now) != now:  # older checkpoints do not have both
            raise ConfigError(
                f"{run_dir}: the {what} not what it was started with, so its steps or scores would be others; "
                f"bring that back, or choose another folder with --run"
            )
    if writes:
        claim_run(config, run_dir)

    optimizer = make_optimizer(config.optimizer, total_steps)
    gradient_step = make_gradient_step(
        apply,
        config.features,
        config.augment,
        mesh=mesh,
        seed=seed,
        ctc=config.training.ctc,
        fast_random=config.training.fast_random,
        consistency=config.training.consistency,
    )
    state = TrainState.create(params, optimizer, ema_decay=ema_decay)
    everywhere, shardings = NamedSharding(mesh, PartitionSpec()), shardings_of(state, mesh)
    jit = partial(jax.jit, compiler_options=compiler_options(platform))
    gradient_step = jit(gradient_step, out_shardings=(shardings.params, everywhere))
    update_step = jit(
        make_update_step(optimizer, ema_decay=ema_decay), donate_argnums=0, out_shardings=(shardings, everywhere)
    )
    add = jit(accumulate, donate_argnums=0, out_shardings=(shardings.params, everywhere))
    eval_step = jit(make_eval_step(apply, config.features, mesh=mesh), out_shardings=rows_of(mesh))
    state = distribute(state, shardings)
    if first_step:
        state = TrainState(**checkpoints.restore(first_step, to_tree(state)))

    progress = progress and writes
    with (
        StopSignal() as signalled,  # until here there is nothing to save
        Monitor(
            run_dir, total_steps=total_steps, resume_step=first_step, progress=progress, silent=not writes
        ) as monitor,
    ):
        watchdog.beat()
        if writes:  # the others have no log; they go on saying it on standard error
            watchdog.say = monitor.message
        monitor.message(describe(config))
        for reason, ids in left_out.items():
            line = f"left out: {len(ids)} {reason}: "
            more = f" and {len(ids) - IDS_SHOWN} more, named in train.log" if len(ids) > IDS_SHOWN else ""
            monitor.message(f"{line}{' '.join(ids)}", shown=f"{line}{' '.join(ids[:IDS_SHOWN])}{more}")
        hours = sum(u.duration for u in utterances) / 3600
        monitor.message(
            f"{sum(p.size for p in params.values()):,} parameters; {len(utterances)} utterances, {hours:.2f} h; "
            f"{len(plan.buckets)} batch shapes, {100 * plan.padding_share(0):.1f} % padding; {total_steps} steps on "
            f"{mesh.size} of {jax.device_count()} {platform} device(s)"
            + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
        )
        if config.training.devices is None and mesh.size < jax.device_count():
            monitor.message(
                f"data.rows_multiple={config.data.rows_multiple} splits over no more than {mesh.size} of the devices; "
                f"set it to a multiple of {jax.device_count()} to use all"
            )
        fused = scan.choose(config.model.scan) == "fused"
        if fused and (line := mingru_kernel.stand_in(config.model.hidden, platform)):
            monitor.message(line)
        if config.training.ctc == "fused" and (line := ctc_kernel.stand_in(platform)):
            monitor.message(line)
        if source is not None:
            monitor.message(f"weights from {source}; new: {' '.join(renewed) or 'none'}")
        for line in set_aside:
            monitor.message(line)
        if first_step:
            done = ", the last: nothing is left to train" if first_step >= total_steps else ""
            monitor.message(f"resumed at step {first_step}{done}")
        if config.data.dev is None and config.training.eval_every is not None:
            monitor.message("training.eval_every is of no use: data.dev names nothing to evaluate")

        def save(step: int, wer: float | None) -> None:
            meta = {
                "step": step,
                "epoch": plan.locate(step * batches_per_step)[0],
                "wer": wer,
                "jaxds2": jaxds2.__version__,
            }
            meta |= {
                "manifest_digest": digest,
                "dev_digest": dev_digest,
                "infeasible": report.infeasible,
                "unreadable": report.unreadable,
            }
            meta |= {"left_out": list(report.left_out)}
            meta |= {"config": dataclasses.asdict(config), "characters": vocabulary.characters}
            try:
                checkpoints.save(step, to_tree(state), meta=meta, wer=wer)
            except jax.errors.JaxRuntimeError as e:  # a state that is split is put together first
                if not is_out_of_memory(e):
                    raise
                raise CheckpointError(
                    f"{checkpoints.root}: step {step} could not be saved, out of memory; older ones are intact; start "
                    f"again with less than data.batch_seconds={config.data.batch_seconds:g}"
                ) from e

        stop = hosts.SharedStop(signalled)

        def should_stop() -> bool:
            watchdog.beat()  # whoever asks has moved
            return stop()

        def score_dev(step: int) -> float:
            begin = time.perf_counter()
            recognizer = Recognizer(config, vocabulary, mesh, eval_step, state.eval_params, step)
            decode = GreedyDecoder(vocabulary)
            scores = evaluate(
                recognizer, dev, decode, with_loss=True, warm_up=False, progress=progress, should_stop=should_stop
            )
            report.evaluation(step, scores, vocabulary, took=time.perf_counter() - begin)
            return scores.words.rate

        report = StepReport(config, plan, [u.id for u in utterances], monitor, total_steps)
        report.infeasible, report.unreadable = resumed.get("infeasible", 0), resumed.get("unreadable", 0)
        report.left_out = dict.fromkeys(resumed.get("left_out", ()))
        shapes = shapes_ahead(plan, first_step * batches_per_step, total_steps * batches_per_step)
        compiled = {}

        def due(step: int, every: int | None, *, epochs: bool = True) -> bool:
            return is_due(step, every, plan, total_steps, batches_per_step, epochs=epochs)

        step = first_step
        try:
            missed = first_step and dev and due(first_step, config.training.eval_every)
            if missed and checkpoints.wer(first_step) is None:  # it was stopped in the middle of its evaluation
                checkpoints.rescore(first_step, score_dev(first_step))
            with load_batches(
                utterances,
                plan,
                vocabulary=vocabulary,
                start_step=first_step * batches_per_step,
                stop_step=total_steps * batches_per_step,
                workers=config.data.workers,
                process=jax.process_index(),
                processes=jax.process_count(),
            ) as batches:
                compiled = compile_ahead(
                    config, gradient_step, state.params, mesh, shapes, monitor, should_stop, planned=len(plan.buckets)
                )
                report.since, report.waited = time.perf_counter(), 0.0

                def gradient(loaded: LoadedBatch) -> tuple[Params, BatchLoss]:
                    shape = loaded.batch.audio_BS.shape
                    if shape not in compiled:
                        compiled[shape] = compile_shape(
                            config, gradient_step, state.params, loaded.batch, mesh, monitor
                        )
                    return compiled[shape](state.params, place(loaded.batch, mesh))

                for group in report.awaited(batches if not stop() else ()):
                    with jax.transfer_guard("disallow"):  # a copy that nobody asked for would wait for the device
                        grads, loss = gradient(group[0])
                        losses, mean = [loss], loss.mean
                        for loaded in group[1:]:
                            more, loss = gradient(loaded)
                            grads, mean = add(grads, mean, more, loss.mean)
                            losses.append(loss)
                        state, metrics = update_step(state, grads, mean)
                    step += 1
                    report.hold(group, losses, metrics)
                    checkpoints.raise_failure()

                    evaluating = bool(dev) and due(step, config.training.eval_every)
                    if evaluating or due(step, config.training.checkpoint_every, epochs=not dev):
                        report.flush()  # the lines of a saved step are not written again on resume
                        save(step, score_dev(step) if evaluating else None)
                    if should_stop():
                        break
            report.flush()
            finished = step >= total_steps
        except Interrupted:
            finished = False  # the evaluation is made up for on resume
        except jax.errors.JaxRuntimeError as e:
            if not is_out_of_memory(e):
                raise
            shape = report.failed_shape()
            needed = None if shape is None else temporary_bytes(compiled.get(shape))
            raise out_of_memory(config, shape, needed=needed, free=free_bytes(mesh)) from e
        except OutOfMemoryError:  # in an evaluation, or compiling a shape that comes late: the state is whole
            if step and checkpoints.last() != step and jax.process_count() == 1:  # of several only all can save
                with contextlib.suppress(TrainingError, CheckpointError, jax.errors.JaxRuntimeError):
                    report.flush()
                    save(step, None)
            raise
        except (TrainingError, PipelineError, EvaluationError) as e:
            with contextlib.suppress(TrainingError, jax.errors.JaxRuntimeError):
                report.flush()
            alone = isinstance(e, PipelineError) and jax.process_count() > 1  # the others go on; only all can save
            if checkpoints.last() != step and not alone:
                save(step, None)
            raise
        if not finished:
            if step and checkpoints.last() != step:  # at step 0 there is nothing to lose
                save(step, None)
            checkpoints.settle()
            by = signalled.received or "a signal to another process"
            monitor.message(f"stopped by {by} at step {step} of {total_steps}; the same command resumes")
            return STOPPED
        checkpoints.settle()
        report.summary()
        board = f"{shlex.quote(sys.executable)} -m tensorboard.main --logdir {shlex.quote(str(run_dir.parent))}"
        monitor.message(f"trained {total_steps} steps: {run_dir}; watch: {board}")
        return FINISHED


def is_due(
    step: int,
    every: int | None,
    plan: BatchPlan,
    total_steps: int,
    batches_per_step: int = 1,
    *,
    epochs: bool = True,
) -> bool:
    """Whether something is done after `step` steps: each `every` steps, or each epoch, and at the end."""
    if step == total_steps:
        return True
    if every is not None:
        return step % every == 0
    before, after = (plan.locate(n * batches_per_step)[0] for n in (step - 1, step))
    return epochs and before != after


def require_same_training(before: Config, config: Config, run_dir: Path) -> None:
    """Raises ConfigError: a run that was started with `before` would learn something else with `config`."""
    changed = [d for d in differences(before, config) if d.partition(":")[0] not in MAY_CHANGE]
    if changed:
        raise ConfigError(
            f"{run_dir} was trained with another config ({'; '.join(changed)}); "
            f"choose another folder with --run, or delete this one"
        )


def claim_run(config: Config, run_dir: Path) -> None:
    """Make the run's folder, and write its config there where it is not what is there already."""
    path = run_dir / "config.json"
    if not path.exists() or differences(read_config(path), config):
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, path)


def init_run(path: str) -> Path:
    """The run that `--init-from` names. Raises ConfigError: it is none."""
    if not (Path(path) / "config.json").exists():
        raise ConfigError(f"--init-from {path} (training.init_from): no config.json in it, so it is no run of train.py")
    return Path(path)


def initial_params(run_dir: Path, params: Params, characters: str) -> tuple[Params, list[str]]:
    """The best weights of another run, and the names of the weights that stay new.

    Only the head may be new: it is renewed where the alphabet differs.

    Raises:
      CheckpointError: no checkpoint there, or the models differ in more than their heads.
    """
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        trained = checkpoints.restore_params(checkpoints.resolve("best"))
    renewed = []
    if read_config(run_dir / "config.json").data.characters != characters:
        renewed = sorted(name for name in params if name.startswith("head."))
    for name, value in params.items():
        if name not in renewed and (name not in trained or trained[name].shape != value.shape):
            there = trained[name].shape if name in trained else "absent"
            raise CheckpointError(
                f"training.init_from={run_dir}: {name} is {there} there and {value.shape} here; "
                f"give this config the same model and features as that run"
            )
    return {
        name: value if name in renewed else jax.numpy.asarray(trained[name]) for name, value in params.items()
    }, renewed
