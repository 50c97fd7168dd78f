"""The GPU suite without a GPU: it runs in tiny shapes, and nothing that goes wrong in a part loses another one."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_kernels
import gpu_parts
import gpu_parts_broken as broken
import gpu_peer
import gpu_training
import jax
import pytest
from bench_step import SMALL
from gpu_suite import Column, Suite, clock, torch_columns
from toy_runs import config

from jaxds2.config import save_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ON_GPU = Suite(device="NVIDIA H200", platform="gpu", rounds=1, small=True, config=None)


def measure(parts, folder, seconds=60.0, suite=ON_GPU, only=()) -> tuple[int, dict]:
    """The exit code, and the blocks of each part."""
    weighted = [(part, 1.0) for part in parts]
    end = gpu_parts.now() + seconds
    code = gpu_parts.measure(weighted, suite, folder, end, {}, kernel_fault=gpu_kernels.kernel_fault, only=only)
    return code, {path.stem: json.loads(path.read_text())["blocks"] for path in sorted(folder.glob("*.json"))}


def test_without_a_gpu_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu, "find_device", lambda: ("cpu", "cpu"))
    assert gpu.main() == 1
    assert "no GPU here; --small" in capsys.readouterr().err

    def broken() -> tuple[str, str]:
        raise subprocess.TimeoutExpired("python", 120)

    monkeypatch.setattr(gpu, "find_device", broken)
    assert gpu.main() == 1
    assert "finds no device: Command 'python' timed out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_crash_costs_one_block_and_is_tried_again_last(tmp_path, monkeypatch):
    code, found = measure([broken.crashing, broken.raising], tmp_path)
    assert code == 1
    assert found["0-crashing"]["before"]["value"] == 1
    assert found["0-crashing"]["crash"]["error"] == "its process ended with SIGSEGV"
    assert found["0-crashing"]["after"]["value"] == 3
    assert found["1-raising"]["raises"]["error"] == "ValueError: out of luck"
    assert found["1-raising"]["partly"].items() >= {"value": 2, "error": "torch: out of memory"}.items()
    monkeypatch.setenv("RECOVERED", "1")
    (tmp_path / "0-crashing.json").write_text('{"blocks": {"before"')  # torn: as if it were not there
    code, found = measure([broken.crashing, broken.raising], tmp_path)
    assert code == 1
    assert list(found["0-crashing"]) == ["before", "after", "crash"]  # what failed was tried once more, at the end
    assert found["1-raising"]["raises"]["value"] == 1


def test_what_failed_in_an_earlier_call_comes_after_what_was_never_tried(tmp_path, capfd):
    measure([broken.kernel, broken.crashing], tmp_path)
    capfd.readouterr()
    measure([broken.kernel, broken.crashing, broken.asks], tmp_path)
    begun = [line.split(";")[0] for line in capfd.readouterr().out.splitlines() if line.startswith("==")]
    assert begun == ["== 2-asks: told", "== 1-crashing: crash"]


def test_a_hang_costs_its_share_of_the_time_and_leaves_no_process(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu_parts, "LEAST", 1.0)
    code, found = measure([broken.hanging, broken.kernel], tmp_path, seconds=8.0)
    assert code == 1
    assert found["0-hanging"]["hang"]["error"] == "killed: it did not end in time"
    assert found["1-kernel"]["probe"]["missing"] is None
    assert not list(tmp_path.glob("*.partial"))
    output = capfd.readouterr()
    assert "in hang" in output.err  # where it hung
    children = {int(line.split()[1]) for line in output.out.splitlines() if line.startswith("started")}
    assert children
    deadline = gpu_parts.now() + 60  # a kill is obeyed when the machine comes to it
    while any(is_alive(child) for child in children):
        assert gpu_parts.now() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_what_does_not_fit_into_the_time_is_left_for_the_next_call(tmp_path):
    code, found = measure([broken.kernel], tmp_path, seconds=gpu_parts.LEAST / 2)
    assert (code, found) == (75, {})
    code, found = measure([broken.kernel], tmp_path)
    assert code == 0
    assert found["0-kernel"]["probe"]["missing"] is None


@pytest.mark.parametrize(
    ("first", "missing", "told", "forms"),
    [
        (broken.kernel, None, None, ["associative", "fused"]),
        (broken.kernel, "it is off", "it is off", ["associative"]),
        (broken.crashing, None, "crash: its process ended with SIGSEGV", ["associative"]),
    ],
)
def test_the_kernel_is_used_where_its_own_part_has_passed(tmp_path, monkeypatch, first, missing, told, forms):
    if missing:
        monkeypatch.setenv("MISSING", missing)
    _, found = measure([first, broken.asks], tmp_path)
    assert found["1-asks"]["told"]["kernel"] == told
    assert found["1-asks"]["told"]["forms"] == forms
    assert ON_GPU.forms(100, "fused", "associative") == ("associative",)  # no multiple of 128


def test_a_kernel_whose_part_has_not_tried_everything_has_not_passed():
    probed = {"probe": {"missing": None}}
    assert gpu_kernels.kernel_fault(probed, ["800x100x1024-bfloat16"]) == "not tried yet: 800x100x1024-bfloat16"
    assert gpu_kernels.kernel_fault({}, ["probe"]) == "not tried yet: probe"
    assert gpu_kernels.kernel_fault(probed, []) is None


def test_what_failed_of_the_kernels_part_is_tried_again_before_anything_else(tmp_path, monkeypatch):
    measure([broken.raising], tmp_path, only=["raises"])
    monkeypatch.setenv("RECOVERED", "yes")
    _, found = measure([broken.raising, broken.asks], tmp_path, only=["raises", "told"])
    assert found["0-raising"]["raises"]["value"] == 1
    assert found["1-asks"]["told"]["kernel"] == "not tried yet: partly"


def test_parts_and_blocks_can_be_asked_for_by_name(tmp_path, monkeypatch, capsys):
    _, found = measure([broken.kernel, broken.asks, broken.raising], tmp_path, only=["asks", "partly"])
    assert {part: list(blocks) for part, blocks in found.items()} == {"1-asks": ["told"], "2-raising": ["partly"]}
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--only", "kernel", "colonel"])
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu, "find_device", lambda: ("cpu", "cpu"))
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "no part or block colonel; there are kernel probe program" in capsys.readouterr().err


def test_a_torch_that_cannot_be_imported_costs_its_own_columns_alone(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    builders = {"ours": lambda: Column(lambda: None)} | torch_columns(("torch",), lambda *_: Column(lambda: None))
    table, errors = clock(builders, 1)
    assert list(table) == ["ours"]
    assert errors == {"torch": "OSError: libcudart.so.13: cannot open shared object file"}


def test_a_column_that_fails_is_left_out_with_its_reason():
    calls = []

    def no_memory():
        raise MemoryError("too large\nby far")

    def late() -> Column:
        return Column(lambda: calls.append("late") if len(calls) < 4 else no_memory())

    builders = {"good": lambda: Column(lambda: calls.append("good"), needs=2**20), "never": no_memory, "late": late}
    table, errors = clock(builders, 3)
    assert list(table) == ["good"]
    assert table["good"]["needs, MiB"] == 1
    assert errors == dict.fromkeys(("never", "late"), "MemoryError: too large")
    assert calls == ["good", "late"] * 2 + ["good"] * 2


@pytest.mark.parametrize("dtype", gpu_peer.PRECISIONS)
def test_our_step_computes_in_the_precision_that_it_is_written_under(dtype):
    """JAX's default for float32 on such a GPU is TF32, torch's is not."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax' AdamW wants it
        lowered, _, _ = gpu_peer.lowered_step(SMALL, "sequential", dtype)
    kinds = {"float32": "f32", "bfloat16": "bf16"}
    lines = [
        line for line in lowered.as_text().splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", line)
    ]
    assert len(lines) > 10
    for line in lines:
        exact = "HIGHEST, HIGHEST" in line or "HIGHEST>, #stablehlo<precision HIGHEST" in line
        assert exact or f"x{kinds['bfloat16']}>" in line, line
    assert any("xbf16>" in line for line in lines) == (dtype == "bfloat16")


def test_kernels_are_counted_by_their_calls():
    program = """
      %a = custom-call(%x), custom_call_target="mosaic_gpu_v2", backend_config="module @mosaic_gpu_kernel mosaic_gpu"
      %b = custom-call(%x), custom_call_target="mosaic_gpu", metadata={op_name="mosaic_gpu"}
      %c = custom-call(%x), custom_call_target="__cublas$gemm"
    """
    assert gpu_kernels.kernels_in(program) == 2


def test_the_time_of_a_gpu_is_that_of_its_streams():
    class Named:
        def __init__(self, name, **rest):
            self.name = name
            vars(self).update(rest)

    lines = [
        Named(name, events=[Named(event, duration_ns=1e6 * ms)])
        for name, event, ms in (("XLA Ops", "fusion", 5), ("Stream #1", "fusion_kernel", 4))
    ]
    assert gpu_training.spent([Named("/device:GPU:0", lines=lines)])[1] == {"fusion_kernel": 4}
    assert gpu_training.spent([Named("/host:CPU", lines=lines[:1])]) == ({"/host:CPU XLA Ops": 5}, {"fusion": 5})


def test_a_training_run_that_fails_is_an_error_with_what_it_said(tmp_path):
    suite = Suite("cpu", "cpu", 1, small=True, config=str(tmp_path / "none.py"), until=gpu_parts.now() + 100)
    (block,) = gpu_training.train(suite).values()
    found = block()
    assert found["exit code"] == 2
    assert "none.py" in found["error"]
    assert found["metrics"] == []


def test_a_training_run_that_does_not_end_in_time_is_stopped_and_saved(tmp_path, monkeypatch):
    """A script that stops as train.py does takes its place; and one that does not stop."""
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(gpu_training, "ROOT", tmp_path)
    for stops, code, seconds in (("stops", 75, 20.0), ("stays", -9, 10.0)):
        suite = Suite("NVIDIA H200", "gpu", 1, small=False, config=stops, until=gpu_parts.now() + seconds)
        (block,) = gpu_training.train(suite).values()
        found = block()
        assert found["exit code"] == code
        assert found.get("error") == (f"train.py ended with {code}: {stops}" if code != 75 else None)
        assert ("stopped" in found) == (code == 75)
        assert found["metrics"] == [{"step": 1, "train/data_wait_share": 0.25}]
        assert found["data wait share"] == 0.25


STAND_IN = """
import pathlib, signal, sys, time
config, run = sys.argv[2], pathlib.Path(sys.argv[4])
signal.signal(signal.SIGTERM, lambda *_: config == "stops" and sys.exit(75))
run.mkdir(parents=True, exist_ok=True)
(run / "metrics.jsonl").write_text('{"step": 1, "train/data_wait_share": 0.25}\\n{"step": 2, "tr')
print(config, flush=True)
while True:
    time.sleep(0.05)
"""


def test_the_whole_suite_runs_in_tiny_shapes_without_what_only_training_needs(tones, tmp_path):
    """On a CPU; what it measures there means nothing. All but the last part do without the packages of the blocker."""
    settings = config(tones, steps=2)
    save_config(settings, tmp_path / "config.json")
    (tmp_path / "toy.py").write_text(
        "import pathlib, jaxds2.config\n"
        f"def get_config():\n    return jaxds2.config.read_config(pathlib.Path({str(tmp_path / 'config.json')!r}))\n"
    )
    (tmp_path / "blocker").mkdir()
    (tmp_path / "blocker/sitecustomize.py").write_text(BLOCKER)
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--small", "--out", str(tmp_path / "out")]
    command += ["--config", str(tmp_path / "toy.py")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'blocker'}:{BENCHMARKS.parent}", "BLOCKED": "1"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}  # two parts compile the same step
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout + done.stderr
    written = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert len(written) == 8
    assert sum(len(path.read_bytes()) for path in (tmp_path / "out").iterdir()) < 2**20
    for content in written.values():
        assert content["versions"]["jax"]
        assert "needs" in content["kernel"] or content["part"] == "kernel"
        assert all(block["seconds"] > 0 for block in content["blocks"].values())
    blocks = {name: content["blocks"] for name, content in written.items()}
    for errors in blocks["1-forms"]["mingru"]["errors"].values():
        assert all(0 <= error < 1e-5 for error in errors.values())
    assert set(blocks["2-recurrence"]["recurrence-16"]["columns"]) == {"associative", "fused", "sequential"}
    figures = blocks["4-step"]["tiny-1s-fused"]["figures"]
    assert figures["MFU"] is None  # no data sheet for a CPU
    assert figures["audio hours a second"] > 0
    assert blocks["5-peer"]["float32"]["precision"] != blocks["5-peer"]["bfloat16"]["precision"]
    assert blocks["6-trace"]["tiny"]["measured on"] == "host"
    assert 0 <= blocks["7-train"]["toy"]["data wait share"] <= 1
    assert blocks["7-train"]["toy"]["metrics"][-1]["step"] == 2


BLOCKER = """
import os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

NAMES = set("array_record grain jiwer librosa kenlm matplotlib pyctcdecode soundfile soxr tensorboardX tqdm".split())
if sys.orig_argv[1:2] and sys.orig_argv[1].endswith("train.py"):
    os.environ.pop("BLOCKED", None)  # what it starts has them too
if os.environ.get("BLOCKED"):
    sys.meta_path.insert(0, Blocker())
"""
