"""The whole configuration of a run: frozen typed dataclasses, a Python file, and `section.field=value` overrides.

Precedence: default < config file < command line. Everything is checked when it is built: an unknown field, a wrong type
or two fields that contradict each other is one ConfigError that says what to write instead.
"""

import ast
import dataclasses
import difflib
import json
import math
import re
import runpy
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxds2.files import write_whole

CONFIG_VERSION = 1


class ConfigError(ValueError):
    """A config that cannot be run; its message is one line for the user."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_types(section: Any) -> None:
    """Before the values of a section are compared with anything: are they of the types that its fields declare?"""
    hints = typing.get_type_hints(type(section))
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        try:
            # Set, since an int where a float belongs becomes one.
            object.__setattr__(section, f.name, _coerce(hints[f.name], value))
        except _MismatchError:
            expected = _describe(hints[f.name])
            raise ConfigError(f"{type(section).__name__}.{f.name}: expected {expected}, got {value!r}") from None
        _require_sane(f"{type(section).__name__}.{f.name}", getattr(section, f.name))


def _require_sane(name: str, value: Any) -> None:
    """Numbers that would fail far from here, or, like a learning rate of inf, not at all."""
    if isinstance(value, tuple):
        for item in value:
            _require_sane(name, item)
    elif isinstance(value, float):
        _require(math.isfinite(value), f"{name}={value}: must be finite")
    elif isinstance(value, int):
        _require(abs(value) < 2**31, f"{name}={value}: does not fit 32 bits")


@dataclass(frozen=True)
class DataConfig:
    """Which utterances, and how they become batches."""

    train: tuple[str, ...] = ()
    """Manifests or folders of shards to train on, joined in this order."""
    dev: str | None = None
    """Manifest or folder of shards that chooses the best checkpoint; None: no evaluation while training."""
    test: tuple[str, ...] = ()
    """Manifests or folders of shards for the final figures; never read by training."""
    durations: str | None = None
    """Histogram of durations (JSON, see configs/durations/) for `--dry-run` where a manifest of `train` is missing."""
    characters: str = "abcdefghijklmnopqrstuvwxyz' "
    """The alphabet, in the order of the output classes 1, 2, ...; class 0 is the CTC blank."""
    min_duration: float = 0.1
    """Seconds; shorter utterances are left out of training, counted and named."""
    max_duration: float = 20.0
    """Seconds; longer utterances are left out of training, counted and named."""
    batch_seconds: float = 60.0
    """Seconds of audio in a batch over all devices, padding included; more where `rows_multiple` rows take more. See
    also training.accumulate."""
    num_buckets: int = 8
    """Number of static batch shapes; their edges minimise the padding on the actual manifest."""
    rows_multiple: int = 8
    """Rows of every batch are a multiple of this, so any number of devices that divides it gives the same batches."""
    workers: int = 0
    """Processes that decode audio; 0 decodes in threads of the training process. The batches do not depend on it."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.batch_seconds > 0, f"data.batch_seconds={self.batch_seconds}: must be above 0")
        _require(0 <= self.min_duration < self.max_duration, "data.min_duration must be below data.max_duration")
        _require(self.num_buckets >= 1, f"data.num_buckets={self.num_buckets}: must be at least 1")
        _require(self.rows_multiple >= 1, f"data.rows_multiple={self.rows_multiple}: must be at least 1")
        _require(self.workers >= 0, f"data.workers={self.workers}: must be 0 or more")
        paths = (*self.train, *self.test, self.dev, self.durations)
        _require("" not in paths, "data: a manifest's name is empty; for none set dev=None, train=() or test=()")
        _require(len(set(self.characters)) == len(self.characters), "data.characters holds a character twice")
        _require(len(self.characters) > 0, "data.characters is empty")


@dataclass(frozen=True)
class FeatureConfig:
    """Log-mel filterbank of a 16 kHz waveform."""

    sample_rate: int = 16_000
    n_fft: int = 512
    window_ms: float = 25.0
    hop_ms: float = 10.0
    n_mels: int = 80
    normalize: Literal["utterance", "fixed"] = "utterance"
    """`utterance`: zero mean and unit variance per bin over the utterance; `fixed`: one constant shift and scale, for
    streaming, where the rest of the utterance is not there yet."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.sample_rate >= 1, f"features.sample_rate={self.sample_rate}: must be above 0")
        _require(
            self.window_length <= self.n_fft,
            f"features.n_fft={self.n_fft}: shorter than the window ({self.window_length})",
        )
        _require(self.window_length >= 1, f"features.window_ms={self.window_ms}: less than one sample")
        _require(self.hop_length >= 1, f"features.hop_ms={self.hop_ms}: less than one sample")
        _require(self.n_mels >= 1, f"features.n_mels={self.n_mels}: must be at least 1")

    @property
    def window_length(self) -> int:
        """Samples in an analysis window."""
        return round(self.sample_rate * self.window_ms / 1000)

    @property
    def hop_length(self) -> int:
        """Samples between two frames."""
        return round(self.sample_rate * self.hop_ms / 1000)


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation while training; every draw is keyed by (seed, epoch, utterance)."""

    speed: float = 0.0
    """Speed is drawn from [1 - speed, 1 + speed] and the waveform is resampled in the loader."""
    noise_snr_db: tuple[float, float] | None = None
    """White noise is added at a signal-to-noise ratio drawn from this range of decibels; None: none."""
    mel_warp: float = 0.0
    """The mel axis is stretched by a factor drawn from [1 - mel_warp, 1 + mel_warp]."""
    freq_masks: int = 2
    freq_mask_bins: int = 20
    """Widest frequency mask, in mel bins."""
    time_masks: int = 2
    time_mask_fraction: float = 0.15
    """Widest time mask, as a share of the utterance."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(0 <= self.speed < 0.5, f"augment.speed={self.speed}: must be in [0, 0.5)")
        _require(0 <= self.mel_warp < 0.5, f"augment.mel_warp={self.mel_warp}: must be in [0, 0.5)")
        _require(
            0 <= self.time_mask_fraction <= 1,
            f"augment.time_mask_fraction={self.time_mask_fraction}: must be in [0, 1]",
        )
        _require(
            min(self.freq_masks, self.time_masks, self.freq_mask_bins) >= 0, "augment: mask counts must be 0 or more"
        )
        if self.noise_snr_db is not None:
            _require(
                len(self.noise_snr_db) == 2 and self.noise_snr_db[0] <= self.noise_snr_db[1],
                f"augment.noise_snr_db={self.noise_snr_db}: expected (low, high)",
            )


@dataclass(frozen=True)
class ModelConfig:
    """Deep Speech 2 with minGRU layers."""

    conv_channels: tuple[int, ...] = (32, 32)
    """Output channels of each convolution of the front end."""
    conv_kernels: tuple[tuple[int, int], ...] = ((3, 3), (3, 3))
    """(time, frequency) extent of each convolution, odd."""
    conv_strides: tuple[tuple[int, int], ...] = ((2, 2), (2, 2))
    """(time, frequency) stride of each convolution; the product of the time strides is the subsampling factor."""
    width: int = 256
    """Width of the residual stream."""
    layers: int = 4
    hidden: int = 128
    """State width of a minGRU, per direction."""
    bidirectional: bool = True
    lookahead: int = 0
    """Future output frames that a unidirectional model's lookahead convolution sees (Deep Speech 2, section 3.6)."""
    candidate: Literal["linear", "g"] = "linear"
    """The candidate state: `W x`, or `g(W x)` with the minGRU paper's g."""
    gate_bias: float = 0.0
    """Initial bias of the update gate; below 0 the state starts out remembering longer. Of -1, 0, 1
    and 2 the demo did best with -1 (RESULTS.md); AN4 was measured with 0."""
    depthwise_kernel: int = 5
    """Width of the depthwise convolution before the gates, causal in a unidirectional model; 0: none."""
    feed_forward: int = 0
    """Hidden width of a feed-forward block after each recurrent layer; 0: none."""
    dropout: float = 0.1
    """Dropout on each residual branch, one mask for all frames of an utterance."""
    scan: Literal["auto", "associative", "sequential", "fused"] = "auto"
    """Form of the recurrence (scan.py); `auto` is `fused`, one kernel a layer where an NVIDIA GPU runs it."""
    scan_layers: bool = False
    """Run the layers as one loop over their stacked weights, so that XLA compiles one layer instead of all; the same
    values, weights and checkpoints."""

    def __post_init__(self) -> None:
        _check_types(self)
        n = len(self.conv_channels)
        _require(
            len(self.conv_kernels) == n and len(self.conv_strides) == n,
            f"model: conv_channels, conv_kernels and conv_strides name {n}, {len(self.conv_kernels)} and "
            f"{len(self.conv_strides)} convolutions; give one entry per convolution to each",
        )
        _require(n >= 1, "model.conv_channels is empty: the front end needs at least one convolution")
        _require(min(self.conv_channels) >= 1, f"model.conv_channels={self.conv_channels}: must be at least 1 each")
        pairs_ok = all(len(p) == 2 and min(p) >= 1 for p in (*self.conv_kernels, *self.conv_strides))
        _require(pairs_ok, "model: conv_kernels and conv_strides hold pairs (time, frequency) of positive numbers")
        _require(all(k % 2 == 1 for pair in self.conv_kernels for k in pair), "model.conv_kernels: extents must be odd")
        _require(min(self.width, self.layers, self.hidden) >= 1, "model: width, layers and hidden must be at least 1")
        _require(0 <= self.dropout < 1, f"model.dropout={self.dropout}: must be in [0, 1)")
        _require(
            self.depthwise_kernel >= 0 and self.feed_forward >= 0, "model: depthwise_kernel, feed_forward: 0 or more"
        )
        _require(
            not self.bidirectional or self.depthwise_kernel == 0 or self.depthwise_kernel % 2 == 1,
            f"model.depthwise_kernel={self.depthwise_kernel}: must be odd in a bidirectional model",
        )
        _require(self.lookahead >= 0, f"model.lookahead={self.lookahead}: must be 0 or more")
        _require(
            not (self.bidirectional and self.lookahead),
            "model.lookahead is for unidirectional models; set model.bidirectional=False or model.lookahead=0",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule: linear warmup, then a half cosine down to 0 at the last step."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    """Peak learning rate. Muon's updates of the matrices are scaled to Adam's size, so one rate serves both."""
    warmup_steps: int = 200
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.98
    clip_norm: float | None = 1.0
    """Global gradient norm above which the gradient is scaled down; None: never."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate}: must be above 0")
        _require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, "optimizer.b1, optimizer.b2: must be in [0, 1)")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay}: must be 0 or more")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps}: must be 0 or more")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm={self.clip_norm}: must be above 0 or None",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """How long, on what, and what to keep."""

    seed: int = 0
    epochs: int | None = None
    """Length of the run; give this or `steps`."""
    steps: int | None = None
    """Length of the run; overrides `epochs` when both are given."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype of the matmuls; `auto` is bfloat16 on an accelerator and float32 on a CPU. Parameters, scan, CTC
    and normalisation are always float32."""
    ctc: Literal["optax", "fused"] = "fused"
    """Form of the training loss: ours with its gradient in closed form, or optax's; see ctc.ctc_loss."""
    consistency: float = 0.0
    """Weight of the consistency between two augmented views of each utterance, which doubles the cost of a batch
    (CR-CTC, whose paper has 0.2); 0: one view. `data.batch_seconds` counts an utterance once."""
    fast_random: bool = False
    """Draw dropout's bits with the device's own generator instead of threefry; its masks may then change with the
    number of devices, the batch around an utterance and the version of XLA; see docs/numerics.md."""
    devices: int | None = None
    """Number of local devices to use, on each host; None: all."""
    fsdp: int = 1
    """Devices over which parameters, their average and the optimizer's state are split; 1: each device has all."""
    accumulate: int = 1
    """Batches whose gradients make one update, each label with the same weight. `steps` and everything else that counts
    steps counts updates; each batch needs the memory of one."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights that evaluation uses; 0: none."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: at every evaluation, or every epoch without one."""
    eval_every: int | None = None
    """Steps between evaluations on data.dev; None: every epoch."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl and TensorBoard."""
    max_skipped: int = 20
    """Steps in a row with a non-finite loss or gradient after which the run stops; 0: never. Each of them is skipped,
    counted, and named in the run's skipped.jsonl."""
    watchdog_seconds: float = 600.0
    """When no step, batch of an evaluation or compilation has ended for so long, the run writes where each of its
    threads waits to its stacks.txt, and goes on waiting; 0: never."""
    init_from: str | None = None
    """Run whose best weights to start from; the head is renewed where the alphabet differs."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.seed >= 0, f"training.seed={self.seed}: must be 0 or more")
        for name in ("epochs", "steps", "checkpoint_every", "eval_every", "devices"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"training.{name}={value}: must be at least 1")
        for name in ("fsdp", "accumulate"):
            _require(getattr(self, name) >= 1, f"training.{name}={getattr(self, name)}: must be at least 1")
        _require(self.consistency >= 0, f"training.consistency={self.consistency}: must be 0 or more")
        _require(0 <= self.ema_decay < 1, f"training.ema_decay={self.ema_decay}: must be in [0, 1)")
        _require(self.log_every >= 1, f"training.log_every={self.log_every}: must be at least 1")
        for name in ("max_skipped", "watchdog_seconds"):
            value = getattr(self, name)
            _require(value >= 0, f"training.{name}={value}: must be 0 or more")


@dataclass(frozen=True)
class Config:
    """One run. `name` is the config file's and the run's folder under runs/, unless --run says otherwise."""

    name: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        _check_types(self)
        _require_version(self.version)
        _require(
            self.training.epochs is not None or self.training.steps is not None, "set training.epochs or training.steps"
        )


def _require_version(version: int) -> None:
    _require(
        version == CONFIG_VERSION,
        f"config version {version}: this jaxds2 reads version {CONFIG_VERSION}; use the jaxds2 that wrote it",
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `get_config()` from a Python file and apply `section.field=value` overrides.

    Raises:
      ConfigError: no such file, no get_config() in it, or a bad field or value.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no config file {path}; the shipped ones are in configs/")
    try:
        namespace = runpy.run_path(str(path))
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(f"{path}: {type(e).__name__}: {e}") from e
    if "get_config" not in namespace:
        raise ConfigError(f"{path}: defines no get_config() that returns a jaxds2.config.Config")
    config = _call_get_config(path, namespace["get_config"])
    return override(dataclasses.replace(config, name=path.stem), overrides)


def _call_get_config(path: Path, get_config: Any) -> Config:
    try:
        config = get_config()
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None
    except TypeError as e:
        # A misspelt keyword in the file: name the field as the command line would.
        if m := re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(e)):
            hints = typing.get_type_hints(Config).values()
            sections: dict[str, type] = {c.__name__: c for c in hints if isinstance(c, type)}
            names = [f.name for f in dataclasses.fields({"Config": Config, **sections}.get(m[1], Config))]
            near = difflib.get_close_matches(m[2], names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; fields: {', '.join(names)}"
            raise ConfigError(f"{path}: {m[1]} has no field {m[2]!r}{hint}") from None
        raise ConfigError(f"{path}: {e}") from e
    except Exception as e:
        raise ConfigError(f"{path}: {type(e).__name__}: {e}") from e
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, expected jaxds2.config.Config")
    return config


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Apply `section.field=value` overrides, in order. Raises ConfigError."""
    tree = to_dict(config)
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator:
            raise ConfigError(f"{item!r}: an override reads section.field=value, e.g. training.steps=1000")
        _set(tree, key.strip(), text)
    return from_dict(tree)  # all at once, so that two overrides may depend on each other


def _set(tree: dict[str, Any], key: str, text: str) -> None:
    cls, node, parts = Config, tree, key.split(".")
    for depth, part in enumerate(parts):
        _check_name(cls, part, ".".join(parts[:depth]))
        hint = typing.get_type_hints(cls)[part]
        last = depth == len(parts) - 1
        if dataclasses.is_dataclass(hint):
            if last:
                example = dataclasses.fields(hint)[0].name
                raise ConfigError(f"{key!r} is a section; set one of its fields, e.g. {key}.{example}=...")
            cls, node = typing.cast(type, hint), node[part]
        elif last:
            node[part] = _parse(text, hint)
        else:
            raise ConfigError(f"{key!r}: {'.'.join(parts[: depth + 1])} has no fields of its own")


def _check_name(cls: type, name: str, section: str) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    if name not in names:
        prefix = f"{section}." if section else ""
        near = [prefix + n for n in difflib.get_close_matches(name, names, n=1)] or _elsewhere(name)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"fields: {', '.join(names)}"
        raise ConfigError(f"unknown config field {prefix + name!r}; {hint}")


def _elsewhere(name: str) -> list[str]:
    """Where in any section a field of this name stands, in full."""
    sections = {k: hint for k, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
    return [f"{k}.{name}" for k, cls in sections.items() if any(f.name == name for f in dataclasses.fields(cls))]


def _parse(text: str, hint: Any) -> Any:
    """The Python value that a command-line text stands for; a string field takes the text as it is."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    lowered = {"true": True, "false": False, "none": None}
    if lowered.get(text.strip().lower(), text) is None and type(None) in members:
        return None
    if str in members:
        return text.strip("'\"") if text[:1] == text[-1:] and text[:1] in ("'", '"') else text
    if text.strip().lower() in lowered:
        return lowered[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in typing.get_args(hint))
    if origin is tuple:
        inner = [_describe(a) for a in typing.get_args(hint) if a is not ...]
        return f"a tuple of {inner[0]}" if ... in typing.get_args(hint) else f"a tuple ({', '.join(inner)})"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


class _MismatchError(Exception):
    pass


def _coerce(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
    elif origin in (typing.Union, types.UnionType):
        for member in args:
            try:
                return _coerce(member, value)
            except _MismatchError:
                continue
    elif origin is tuple:
        if args[-1] is ...:
            items = value if isinstance(value, (tuple, list)) else (value,)
            return tuple(_coerce(args[0], item) for item in items)
        if isinstance(value, (tuple, list)) and len(value) == len(args):
            return tuple(_coerce(a, v) for a, v in zip(args, value, strict=True))
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint or (hint is type(None) and value is None):
        return value
    raise _MismatchError


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dictionaries, as in config.json."""
    return dataclasses.asdict(config)


def from_dict(tree: dict[str, Any]) -> Config:
    """The inverse of to_dict, every type checked. Raises ConfigError."""
    return _build(Config, tree, "")


def _build(cls: type, tree: Any, section: str) -> Any:
    where = f"{section}." if section else ""
    if not isinstance(tree, dict):
        raise ConfigError(f"{section or 'config'}: expected a section with fields, got {type(tree).__name__}")
    hints = typing.get_type_hints(cls)
    kwargs: dict[str, Any] = {}
    for name, value in tree.items():
        _check_name(cls, name, section)
        if dataclasses.is_dataclass(hints[name]):
            kwargs[name] = _build(typing.cast(type, hints[name]), value, where + name)
            continue
        try:
            kwargs[name] = _coerce(hints[name], value)
        except _MismatchError:
            raise ConfigError(f"{where}{name}: expected {_describe(hints[name])}, got {value!r}") from None
    return cls(**kwargs)


def save_config(config: Config, path: Path) -> None:
    """Write config.json, whole or not at all. Raises WriteError."""
    write_whole(path, json.dumps(to_dict(config), indent=2) + "\n")


def read_config(path: Path) -> Config:
    """Read the config.json of a run. Raises ConfigError."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no {path}: is {path.parent} a run of train.py?") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: cannot be read as JSON ({e})") from None
    if isinstance(tree, dict) and isinstance(tree.get("version"), int):
        _require_version(tree["version"])  # before the fields, which another version may have more of
    return from_dict(tree)


def differences(a: Config, b: Config) -> list[str]:
    """Fields in which two configs differ, as `section.field: a -> b`."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in tree.items():
            out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return out

    left, right = flat(to_dict(a)), flat(to_dict(b))
    return [f"{name}: {left[name]!r} -> {right[name]!r}" for name in left if left[name] != right[name]]


def describe(config: Config) -> str:
    """The resolved config as one paragraph a section: `section: field=value field=value ...`."""
    paragraphs = [f"config: {config.name}"]
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            # No space after a comma, so that lines break between fields.
            fields = [f"{f.name}={getattr(value, f.name)!r}".replace(", ", ",") for f in dataclasses.fields(value)]
            paragraph = f"{section.name}: {' '.join(fields)}"
            paragraphs.append(
                textwrap.fill(paragraph, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            )
    return "\n".join(paragraphs)
