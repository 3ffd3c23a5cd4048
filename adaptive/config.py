"""Every setting of a run, as frozen dataclasses: typed, hashable, immutable values, which is what the code sees.

`config_dict.py` turns them into what config files edit, and back. Checks that need one dataclass only stand in its
`__post_init__`; checks across them stand with the code that needs them and raise `ConfigError` too, before anything is
compiled.
"""

import dataclasses
import difflib
import math
import typing
from typing import Any, Literal


class ConfigError(ValueError):
  """A setting that cannot work. The message is one line, fit to be shown to the user as it is.

  `leaves_threads`: what failed may have left threads that hang, or go on to tell of it.
  """

  leaves_threads = False


class RunStopped(Exception):  # noqa: N818 - it stopped as the config said
  """A run ended before its last step because something in it went wrong. The message is one line too."""


def require(condition: bool, message: str) -> None:
  """Raises `ConfigError(message)` unless the condition holds."""
  if not condition:
    raise ConfigError(message)


def nearest(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
  """Says which known field a misspelt one probably means."""
  near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
  return f"did you mean {prefix}{near[0]}?" if near else f"{prefix.rstrip('.')} has no fields"


def require_trained(training: "TrainingConfig", setting: str) -> None:
  """ConfigError unless a run whose setting leaves most parameters as they are begins with a trained model's."""
  require(bool(training.init_from), f"{setting} trains what is added to a trained model: name it, training.init_from")


def require_range(
  config: Any, prefix: str, fields: str, low: float, high: float = math.inf, above: bool = False
) -> None:
  """Raises ConfigError unless each of the named fields (blank-separated) is finite and in low .. high.

  Args:
    prefix: of the fields' names in the message. above: whether `low` itself is refused too.
  """
  for field in fields.split():
    value = getattr(config, field)
    fits = math.isfinite(value) and (low < value if above else low <= value) and value <= high
    bounds = f"{'more than' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    require(fits, f"{prefix}{field}={value} must be {bounds}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched for contexts longer than those of pre-training.

  `linear` divides every frequency by `factor`; `llama3` leaves the high frequencies alone and blends between
  (Llama 3.1's `rope_scaling` entry, whose names the fields carry).
  """

  kind: Literal["none", "linear", "llama3"] = "none"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_len: int = 8192

  def __post_init__(self):
    require_range(self, "model.rope_scaling.", "factor low_freq_factor original_max_len", 0, above=True)
    require_range(self, "model.rope_scaling.", "high_freq_factor", self.low_freq_factor, above=True)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The backbone: a decoder-only transformer of the Llama family.

  Attributes:
    vocab_size: rows of the embedding table; at least the tokenizer's vocabulary.
    num_layers, d_model, d_ff: depth, residual width and feed-forward width.
    num_heads, num_kv_heads: query heads and key/value heads (grouped-query attention).
    head_dim: size of one head; 0 means d_model / num_heads.
    ff_groups: the feed-forward axis is stored as [ff_groups, d_ff / ff_groups] and only the groups are sharded, so
      that a narrower sub-model (a prefix of every group) moves no data between devices.
    rope_theta, rope_scaling: rotary position embedding.
    norm_eps: added to the mean square in RMSNorm.
    tied_embeddings: the head reads the embedding table.
    qk_norm: RMSNorm on each query and key head (Qwen3). qkv_bias: bias on the three projections (Qwen2).
    dtype, param_dtype: of the computation, and of the stored parameters.
    remat: what the backward pass recomputes: nothing, whole layers, or all but matrix products.
    scan_unroll: layers in one iteration of the scan over layers; 0 means all of them up to 8, else one, and one with
      `remat`. Unrolled layers compile longer and save copies of stacked activations (15 % of a step's time on a CPU),
      but the compiler computes what they need again early, and holds it as if nothing were recomputed.
    attention: implementation handed to `jax.nn.dot_product_attention`.
    init_std: standard deviation of every matrix at initialisation; residual outputs have it over sqrt(2 num_layers).
  """

  vocab_size: int = 320
  num_layers: int = 6
  d_model: int = 128
  d_ff: int = 384
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 0
  ff_groups: int = 1
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling = RopeScaling()
  norm_eps: float = 1e-5
  tied_embeddings: bool = True
  qk_norm: bool = False
  qkv_bias: bool = False
  dtype: Literal["float32", "bfloat16"] = "float32"
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Literal["none", "full", "dots"] = "none"
  scan_unroll: int = 0
  attention: Literal["xla", "cudnn"] = "xla"
  init_std: float = 0.02

  def __post_init__(self):
    require_range(self, "model.", "vocab_size num_layers d_model d_ff num_heads num_kv_heads ff_groups", 1)
    require_range(self, "model.", "head_dim scan_unroll norm_eps init_std", 0)
    require_range(self, "model.", "rope_theta", 0, above=True)
    require(
      self.head_dim > 0 or self.d_model % self.num_heads == 0,
      f"model.d_model={self.d_model} is not divisible by model.num_heads={self.num_heads}; set model.head_dim",
    )
    require(self.head_size % 2 == 0, f"size of a head, {self.head_size}, must be even: rotary embedding turns pairs")
    require(
      self.num_heads % self.num_kv_heads == 0,
      f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}",
    )
    require(
      self.d_ff % self.ff_groups == 0,
      f"model.d_ff={self.d_ff} is not divisible by model.ff_groups={self.ff_groups}",
    )

  def unroll(self, layers: int) -> int:
    """How many of so many layers are in one iteration of the scan over them."""
    return self.scan_unroll or (layers if 0 < layers <= 8 and self.remat == "none" else 1)

  @property
  def head_size(self) -> int:
    """Size of one head (`h` in einsums): `head_dim`, or what d_model leaves for it."""
    return self.head_dim or self.d_model // self.num_heads

  @property
  def q_per_kv(self) -> int:
    """Query heads that share one key/value head (`g` in einsums)."""
    return self.num_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes rows of tokens.

  Attributes:
    source: `stdlib` is the source code of the running interpreter's standard library; `files` reads `path`; `tfds`
      reads a prepared TensorFlow Datasets set through `tfds.data_source` (no TensorFlow); `questions` reads `path`, and
      scores the answers only.
    path: for `files`: a folder (every file below it) or a glob such as `corpus/**/*.txt`. For `questions`: a JSONL file
      (see `adaptive.data.questions`) to learn from.
    validation_path: for `questions`: the file of those held out. Empty: held out of `path`, as `validation_fraction`
      says.
    labels: for `questions`: what a search found for them (see `adaptive.data.labels`). Those without a label are left
      out. Empty: none.
    prefix: what stands before a question, and before what is scored or continued: `bos`, as before every document, or
      what the tokenizer's own `template` puts there, to which a published model is used. Packed text always has `bos`.
    tfds_name, tfds_data_dir, tfds_text_key: data set, where it lies (empty: TFDS's default), the feature with the text.
    tfds_train_split, tfds_validation_split: TFDS's words for the two splits.
    tokenizer: `bytes`, or the path of a Hugging Face `tokenizer.json`.
    seq_len: tokens in a row.
    batch_size: rows in a step, over all hosts and devices.
    validation_fraction: of `stdlib` and `files`: a file belongs to validation by the hash of its relative path; of
      `questions`: a question by that of its id.
    bad_files: what to do with a file (an example of TFDS) that cannot be read or is not UTF-8: refuse the data, or name
      it in a warning and leave it out. An empty file is left out and counted.
  """

  source: Literal["stdlib", "files", "tfds", "questions"] = "stdlib"
  path: str = ""
  validation_path: str = ""
  labels: str = ""
  prefix: Literal["bos", "template"] = "bos"
  tfds_name: str = ""
  tfds_data_dir: str = ""
  tfds_text_key: str = "text"
  tfds_train_split: str = "train"
  tfds_validation_split: str = "validation"
  tokenizer: str = "bytes"
  seq_len: int = 256
  batch_size: int = 16
  validation_fraction: float = 0.05
  bad_files: Literal["error", "skip"] = "error"

  def __post_init__(self):
    require_range(self, "data.", "seq_len", 2)
    require_range(self, "data.", "batch_size", 1)
    require(
      0.0 < self.validation_fraction < 1.0,
      f"data.validation_fraction must lie between 0 and 1, got {self.validation_fraction}",
    )
    reads_path = self.source in ("files", "questions")
    require(not reads_path or bool(self.path), f"data.source={self.source!r} needs data.path")
    for field in ("validation_path", "labels"):
      fits = self.source == "questions" or not getattr(self, field)
      require(fits, f"data.{field} is for data.source='questions', not for {self.source!r}")
    require(self.source != "tfds" or bool(self.tfds_name), "data.source='tfds' needs data.tfds_name")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW or Muon, and the learning rate over the run.

  Attributes:
    name: `adamw`, or `muon` (matrices inside the layers by Muon, everything else by AdamW).
    learning_rate: the peak. Muon's own peak is `muon_learning_rate`.
    schedule: `wsd` is warm-up, stable, linear decay; `cosine` is warm-up, then a cosine.
    warmup_steps: linear rise from zero. decay_fraction: share of the run spent in `wsd`'s decay.
    final_fraction: learning rate at the end, as a share of the peak.
    weight_decay: decoupled; on matrices only (never on norms, biases and, being a look-up, the embedding table; under
      `muon` not on an untied head either, which AdamW updates without decay).
    clip_norm: global gradient norm is clipped to this; 0 turns it off.
    b1, b2, eps: Adam's. b1 is Muon's momentum too.
    mu_dtype: of the stored first moment, Adam's and Muon's; empty is the parameters' dtype. `bfloat16` saves two bytes
      per parameter; the second moment stays, since bfloat16 would round its small changes away.
    inactive: what happens where a step's gradient is exactly zero, as it is outside the sub-models of the step: `keep`
      lets momentum and weight decay go on (Muon's at full size), `freeze` leaves parameters and moments bitwise alone.
  """

  name: Literal["adamw", "muon"] = "adamw"
  learning_rate: float = 3e-3
  muon_learning_rate: float = 2e-2
  schedule: Literal["wsd", "cosine"] = "wsd"
  warmup_steps: int = 50
  decay_fraction: float = 0.3
  final_fraction: float = 0.05
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  mu_dtype: Literal["", "float32", "bfloat16"] = ""
  inactive: Literal["keep", "freeze"] = "keep"

  def __post_init__(self):
    require_range(self, "training.optimizer.", "learning_rate muon_learning_rate eps", 0, above=True)
    require_range(self, "training.optimizer.", "warmup_steps weight_decay clip_norm", 0)
    require_range(self, "training.optimizer.", "decay_fraction final_fraction b1 b2", 0, 1)


GuardAction = Literal["stop", "skip", "rollback"]


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """What happens when an update is bad; it is never made (see `adaptive.training.guard`).

  `stop` ends the run, naming the step, the batch's rows and the last good checkpoint. `skip` goes on with the next
  batch. `rollback` goes back to the last checkpoint and on from there with the data after the bad batch.

  Attributes:
    nonfinite: when loss or gradient norm is not finite.
    spike: when either is more than `spike_sigmas` standard deviations above its mean over the last `spike_window`
      updates; `off` does not look.
    limit: more skips in a row than this, or more rollbacks in all, end the run.
  """

  nonfinite: GuardAction = "stop"
  spike: Literal["off", "stop", "skip", "rollback"] = "off"
  spike_sigmas: float = 6.0
  spike_window: int = 128
  limit: int = 10

  def __post_init__(self):
    require_range(self, "training.guard.", "spike_sigmas", 0, above=True)
    require_range(self, "training.guard.", "spike_window", 2)
    require_range(self, "training.guard.", "limit", 1)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """The loop.

  Attributes:
    steps: optimizer updates in the whole run.
    grad_accum: micro-batches whose gradients are averaged in one update; divides data.batch_size.
    eval_every, checkpoint_every, log_every: in steps; 0 means only at the end.
    keep_checkpoints: newest N are kept; at least two, so that a damaged one leaves another.
    keep_best: name of a validation metric, such as `validation/loss`; the checkpoint with its best value is kept too
      (the highest of an accuracy, the lowest of anything else). Empty: none. Every checkpoint must be evaluated then.
    guard: what happens when a loss or gradient is not finite.
    init_from: workdir of a trained dense model of the same `model`, or of the same method (a second stage), whose
      parameters the run begins with. Empty: none.
    init_layers: which of its layers become those that a recursive model shares: evenly spaced ones, means of those that
      will share, the first, the last before the end, or any (by the seed).
    compilation_cache: folder for compiled programs; empty: `.compilation_cache` beside the workdir.
    tensorboard, wandb: further metric writers beside `metrics.jsonl`; wandb takes the project's name.
  """

  steps: int = 300
  grad_accum: int = 1
  optimizer: OptimizerConfig = OptimizerConfig()
  eval_every: int = 0
  checkpoint_every: int = 0
  log_every: int = 10
  keep_checkpoints: int = 2
  keep_best: str = ""
  guard: GuardConfig = GuardConfig()
  init_from: str = ""
  init_layers: Literal["stepwise", "average", "lower", "upper", "random"] = "stepwise"
  compilation_cache: str = ""
  tensorboard: bool = False
  wandb: str = ""

  def __post_init__(self):
    require_range(self, "training.", "steps grad_accum log_every", 1)
    require_range(self, "training.", "keep_checkpoints", 2)
    require(
      not self.keep_best or (self.eval_every > 0 and self.checkpoint_every % self.eval_every == 0),
      "training.keep_best needs an evaluation at every checkpoint: set training.eval_every, and training."
      f"checkpoint_every={self.checkpoint_every} to a multiple of it (now {self.eval_every})",
    )
    require_range(self, "training.", "eval_every checkpoint_every", 0)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """What `eval.py` measures.

  Attributes:
    rows: held-out rows, the same for every sub-model (and for every run on the same data).
    batch_size: rows evaluated at a time.
    latency: whether to time sub-models. latency_repeats: timed prompts of each, and runs of tokens after them.
    prefill_tokens: prompt length of the latency measurement, at batch size 1.
  """

  rows: int = 256
  batch_size: int = 32
  latency: bool = True
  latency_repeats: int = 50
  prefill_tokens: int = 128

  def __post_init__(self):
    require_range(self, "evaluation.", "rows batch_size latency_repeats prefill_tokens", 1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis. -1, in one place at most, takes what the others leave."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One run: what a config file describes and a workdir holds.

  `method` is the `Config` of one method (see `adaptive.methods`); in a ConfigDict it has the extra field `name`.
  """

  method: Any
  seed: int = 0
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  training: TrainingConfig = TrainingConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  mesh: MeshConfig = MeshConfig()
