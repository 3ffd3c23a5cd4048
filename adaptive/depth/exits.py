"""The exits of a model, and the settings by which tokens leave at them.

A token leaves the stack of layers at the first exit where it is sure enough, or where the dial says. What tokens that
have left leave to others in the layers above is a rule of `adaptive.depth.visits`, or keys and values are those of the
full model, as if no token had left: `exact` takes a token up when a later one needs it, `recompute` feeds all that left
again with every token, as EE-LLM does. `adaptive.depth.walk` asks tokens at exits, `adaptive.depth.climb` takes them up
from exit to exit.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive.backbone.layers import rms_norm
from adaptive.backbone.transformer import Params, Transformer
from adaptive.config import ModelConfig, require, require_range
from adaptive.depth import visits
from adaptive.depth.signals import SIGNALS, Signal

KeyValues = visits.KeyValues
FULL_KEYS = ("exact", "recompute")  # whole rows are then those of the plain model
SignalName = Literal[
  "max_probability", "margin", "entropy", "stability", "patience", "cosine", "saturation", "random", "learned"
]


@dataclasses.dataclass(frozen=True)
class Exiting:
  """How a trained model leaves early. None of it is trained, so all of it may change afterwards.

  Attributes:
    depths: numbers of layers after which a token may leave; empty: wherever the model was trained to.
    signal: what says that a token is sure, see `adaptive.depth.signals`; `learned` is what the method trained for it.
    thresholds: each is a sub-model: a token leaves where its signal is above, strictly.
    per_exit: each entry is a sub-model too: a threshold for every exit but the last, one after the other for all
      sub-models (what the solver of `adaptive.evaluation.thresholds` finds).
    decay: CALM's lower thresholds for later tokens, threshold * (1 - decay + decay e^(-rate position / decay_length));
      0 is none, the paper takes 0.1; no threshold may be negative then, for it would rise. decay_rate: `rate`; 4 in
      the paper. decay_length: tokens.
    kv: what later tokens attend to in layers that a token did not run: a rule of `adaptive.depth.visits` (`latest` is
      for layers that run several times), `exact`, or `recompute`.
    wait: with `exact` and `recompute`, how many tokens of a row may wait below layers that they did not run; the next
      goes all the way and takes them along, see `adaptive.depth.lazy`.
  """

  depths: tuple[int, ...] = ()
  signal: SignalName = "max_probability"
  thresholds: tuple[float, ...] = (0.5, 0.7, 0.9)
  per_exit: tuple[float, ...] = ()
  decay: float = 0.0
  decay_rate: float = 4.0
  decay_length: int = 512
  kv: KeyValues = "project"
  wait: int = 8


DEFAULT = Exiting()


class Rule(NamedTuple):
  """The dial of a sub-model; a depth and thresholds, or traced arrays of them.

  Attributes:
    depth: nobody runs more layers. thresholds: of each exit but the last, [e - 1]; inf lets none leave.
  """

  depth: int | jax.Array
  thresholds: tuple[float, ...] | jax.Array


class Loop(NamedTuple):
  """What happens before each segment of the layers where a recurrence has more to it than layers that run again.

  Attributes:
    lead: number of layers that run once, before the loop; e [b, t, d] is the stream after them.
    start: (params, e, positions [b, t]) -> the stream with which the loop begins.
    enter: (params, x, e) -> what the layers of a pass read, [b, t, d]. flops: of that, for a token and pass.
  """

  lead: int
  start: Callable[[Params, jax.Array, jax.Array], jax.Array]
  enter: Callable[[Params, jax.Array, jax.Array], jax.Array]
  flops: float = 0.0


class Ends(NamedTuple):
  """What ends a text at a token after which all would be wrong (the Stop of SEC).

  Attributes:
    says: (params, exit, x [b, t, d], positions [b, t]) -> of which tokens, bool [b, t]; asked at the last exit too.
    token: what such a token predicts, for certain.
  """

  says: Callable[[Params, int, jax.Array, jax.Array], jax.Array]
  token: int


def check_end(model: nn.Module, eos: int) -> None:
  """Raises ConfigError for a model that would end its texts with a token that is not the tokenizer's end."""
  ends = model.exits.ends if hasattr(model, "exits") else None
  require(
    ends is None or ends.token == eos,
    f"method.exit.stop_token={ends and ends.token} is not the tokenizer's end of a document, {eos}",
  )


class Exits(NamedTuple):
  """The exits of a model.

  Attributes:
    model: the backbone. how: settings. depths: of all exits, increasing; the last is the model's.
    own: (params, depth) -> the norm's scale [d] and the matrix [d, v] of an exit's own head, or None where it uses the
      model's.
    learned: (params, exit) -> the signal that the method trained.
    path: which of the parameters' layers each layer is, where some run several times; in their order if empty.
    shown: depth -> the dial of a sub-model where all leave there.
    loop: what passes of a shared block begin with.
    added_params: parameters beside the backbone's and the exits' own heads. own_params: of the own head of each early
      exit; 0 where there is none.
    learned_flops: of a learned signal, for each token and exit that is asked.
    kept: names of parameters that compute in float32 whatever the model does, so that decoding does not round them.
    ends: what ends a text, asked of all sub-models with thresholds.
    first_stays: whether the first token of a document leaves at the model's own exit, whatever it sees.
  """

  model: Transformer
  how: Exiting
  depths: tuple[int, ...]
  own: Callable[[Params, int], Params | None] = lambda params, depth: None
  learned: Callable[[Params, int], Signal] | None = None
  path: tuple[int, ...] = ()
  shown: Callable[[int], tuple[str, int]] = lambda depth: ("depth", depth)
  loop: Loop | None = None
  added_params: int = 0
  own_params: int = 0
  learned_flops: float = 0.0
  kept: tuple[str, ...] = ()
  ends: Ends | None = None
  first_stays: bool = False

  @property
  def config(self) -> ModelConfig:
    return self.model.config

  @property
  def layers(self) -> tuple[int, ...]:
    """Which of the parameters' layers each layer is."""
    return self.path or tuple(range(self.config.num_layers))

  @property
  def segments(self) -> tuple[tuple[int, int], ...]:
    """First and last + 1 layer before each exit."""
    return tuple(zip((0, *self.depths), self.depths))

  def signal(self, params: Params, which: int) -> Signal:
    """What says at an exit that a token is sure; it reads logits at all exits or at none."""
    return self.learned(params, which) if self.how.signal == "learned" else SIGNALS[self.how.signal]

  @property
  def reads_logits(self) -> bool:
    return self.signal({}, 0).reads_logits

  def asked_flops(self, which: int) -> float:
    """FLOPs of what was learned and is asked of a token at an exit."""
    signal = self.how.signal == "learned" and which < len(self.depths) - 1
    return self.learned_flops if signal or self.ends is not None else 0.0

  def head(self, params: Params, which: int, x: jax.Array) -> jax.Array:
    """Float32 logits [b, t, v] at an exit."""
    own = self.own(params, self.depths[which])
    if own is None:
      return self.model.apply({"params": params}, x, method="head")
    return norm_and_matrix(x, own["scale"], own["matrix"], self.config.norm_eps)


def check(
  config: ModelConfig, how: Exiting, trained: Sequence[int], learned: bool = False, repeats: bool = False
) -> tuple[int, ...]:
  """The depths of all exits, the model's last; ConfigError for those that cannot be.

  Args:
    trained: depths at which the model was trained to leave. learned: whether the method trains a signal.
    repeats: whether layers run several times.
  """
  full = config.num_layers
  require(how.kv != "latest" or repeats, "method.exit.kv='latest': no layer of this method runs twice, take 'copy'")
  require(how.signal != "learned" or learned, "method.exit.signal='learned': this method trains none")
  depths = how.depths or tuple(trained)
  for name, wanted in (("method.exits", trained), ("method.exit.depths", how.depths)):
    require(
      list(wanted) == sorted(set(wanted)) and all(0 < depth <= full for depth in wanted),
      f"{name}={tuple(wanted)} must be increasing and lie in 1..{full}",
    )
  strange = sorted(set(depths) - set(trained) - {full})
  require(not strange, f"method.exit.depths: no exit was trained at {strange}, only at {tuple(trained)}")
  depths = tuple(sorted({*depths, full}))
  early = len(depths) - 1
  require(
    not how.per_exit or (early > 0 and len(how.per_exit) % early == 0),
    f"method.exit.per_exit has {len(how.per_exit)} thresholds, which is no multiple of {early} early exits",
  )
  _check_numbers(how)
  return depths


def _check_numbers(how: Exiting) -> None:
  limits = (*how.thresholds, *how.per_exit)
  require(all(map(math.isfinite, limits)), "method.exit.thresholds and per_exit must be finite; 1e9 lets none leave")
  require(0 <= how.decay < 1, f"method.exit.decay={how.decay} must be at least 0 and less than 1")
  require(  # what is all but 0 stays so: `calibrate.py` lets signals of 0 leave by a threshold just below
    not how.decay or min(limits, default=0.0) > -1e-9,
    f"method.exit.decay={how.decay} would raise the negative threshold {min(limits, default=0.0):g} for later tokens",
  )
  require_range(how, "method.exit.", "decay_rate", 0)
  require_range(how, "method.exit.", "decay_length", 0, above=True)
  require_range(how, "method.exit.", "wait", 1, 1024)  # each is a row that every step computes


def rules(exits: Exits) -> dict[tuple[tuple[str, int | float], ...], Rule]:
  """Every sub-model by its dial: a fixed depth, a threshold, thresholds for each exit; the full model last."""
  how, early = exits.how, len(exits.depths) - 1
  full, never = exits.depths[-1], (math.inf,) * early
  found = {(exits.shown(depth),): Rule(depth, never) for depth in exits.depths[:-1]}
  if early:
    found |= {(("threshold", value),): Rule(full, (value,) * early) for value in how.thresholds}
    plans = [how.per_exit[start : start + early] for start in range(0, len(how.per_exit), early)]
    found |= {(("plan", number),): Rule(full, plan) for number, plan in enumerate(plans, 1)}
  return {**found, (exits.shown(full),): Rule(full, never)}


def fixed(rule: Rule) -> bool:
  """Whether no token leaves but at the rule's depth; of a rule of plain numbers."""
  return min(rule.thresholds, default=math.inf) == math.inf


def stands_alone(exits: Exits, rule: Rule) -> bool:
  """Whether a sub-model is an ordinary dense model, with nothing of what the method adds; of a rule of plain numbers.

  None is where a pass of a loop is more than its layers, or a head reads a mean of streams.
  """
  return fixed(rule) and exits.loop is None and not exits.signal({}, 0).averages


def choose(all_rules: Sequence[Rule], index: int | jax.Array) -> Rule:
  """The rule at an index; for a traced one, of traced numbers."""
  if isinstance(index, int):
    return all_rules[index]
  depths, thresholds = zip(*all_rules)
  return Rule(jnp.asarray(depths)[index], jnp.asarray(thresholds, jnp.float32)[index])


def up_to(exits: Exits, rule: Rule) -> Exits:
  """Without the exits above a fixed depth; of a rule of plain numbers."""
  kept = tuple(depth for depth in exits.depths if depth <= rule.depth)
  return exits._replace(depths=kept) if fixed(rule) else exits


def repeated(exits: Exits, depth: int) -> int:
  """How many of the first layers are runs of a layer that has run before, and bring no parameters."""
  return depth - len(set(exits.layers[:depth]))


def norm_and_matrix(x: jax.Array, scale: jax.Array, matrix: jax.Array, eps: float) -> jax.Array:
  """A head of an exit's own: RMSNorm, then a matrix [d, v]; float32 logits."""
  return jnp.einsum("btd,dv->btv", rms_norm(x, scale, eps), matrix.astype(x.dtype), preferred_element_type=jnp.float32)
