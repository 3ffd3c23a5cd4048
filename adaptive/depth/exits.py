"""Early exits: a token leaves the stack of layers at the first exit where it is sure enough, or where the dial says.

One walk over the exits (`leave`) serves both faces: `one_shot` on whole rows, where all is computed and masked, and
`decoder`, where layers that no row needs are left out. What tokens that have left leave to others in the layers above
is a rule of `adaptive.depth.visits`, or `exact`: keys and values are those of the full model, as if no token had left.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from adaptive import cost as costs
from adaptive.backbone import decoding
from adaptive.backbone.layers import rms_norm
from adaptive.backbone.transformer import Batch, Params, Transformer
from adaptive.config import ModelConfig, require
from adaptive.depth import visits
from adaptive.depth.signals import SIGNALS, Seen
from adaptive.losses import SumCount

KeyValues = Literal["project", "copy", "hole", "exact"]


@dataclasses.dataclass(frozen=True)
class Exiting:
  """How a trained model leaves early. None of it is trained, so all of it may change afterwards.

  Attributes:
    depths: numbers of layers after which a token may leave; empty: wherever the model was trained to.
    signal: what says that a token is sure, see `adaptive.depth.signals`.
    thresholds: each is a sub-model: a token leaves where its signal is above, strictly.
    per_exit: each entry is a sub-model too: a threshold for every exit but the last, one after the other for all
      sub-models (what the solver of `adaptive.evaluation.thresholds` finds).
    decay: CALM's lower thresholds for later tokens, threshold * (1 - decay + decay e^(-rate position / decay_length));
      0 is none, the paper takes 0.1. decay_rate: `rate`; 4 in the paper. decay_length: tokens.
    kv: what later tokens attend to in layers that a token did not run.
    wait: with `exact`, how many tokens of a row may wait below layers that they did not run (`adaptive.depth.lazy`).
  """

  depths: tuple[int, ...] = ()
  signal: Literal["max_probability", "margin", "entropy", "stability", "patience", "cosine", "saturation"] = (
    "max_probability"
  )
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


class Exits(NamedTuple):
  """The exits of a model.

  Attributes:
    model: the backbone. how: settings. depths: of all exits, increasing; the last is the model's.
    own: (params, depth) -> the norm's scale [d] and the matrix [d, v] of an exit's own head, or None where it uses the
      model's.
  """

  model: Transformer
  how: Exiting
  depths: tuple[int, ...]
  own: Callable[[Params, int], Params | None] = lambda params, depth: None

  @property
  def config(self) -> ModelConfig:
    return self.model.config

  @property
  def segments(self) -> tuple[tuple[int, int], ...]:
    """First and last + 1 layer before each exit."""
    return tuple(zip((0, *self.depths), self.depths))

  def head(self, params: Params, which: int, x: jax.Array) -> jax.Array:
    """Float32 logits [b, t, v] at an exit."""
    own = self.own(params, self.depths[which])
    if own is None:
      return self.model.apply({"params": params}, x, method="head")
    return norm_and_matrix(x, own["scale"], own["matrix"], self.config.norm_eps)


def check(config: ModelConfig, how: Exiting, trained: Sequence[int]) -> tuple[int, ...]:
  """The depths of all exits, the model's last; ConfigError for those that cannot be.

  Args:
    trained: depths at which the model was trained to leave.
  """
  full = config.num_layers
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
  finite = all(map(math.isfinite, (*how.thresholds, *how.per_exit)))
  require(finite, "method.exit.thresholds and per_exit must be finite; 1e9 lets none leave")
  require(0 <= how.decay < 1, f"method.exit.decay={how.decay} must be at least 0 and less than 1")
  require(how.wait >= 1, f"method.exit.wait={how.wait} must be at least 1")
  require(how.decay_length > 0, f"method.exit.decay_length={how.decay_length} must be more than 0")
  return depths


def rules(exits: Exits) -> dict[tuple[tuple[str, int | float], ...], Rule]:
  """Every sub-model by its dial: a fixed depth, a threshold, thresholds for each exit; the full model last."""
  how, early = exits.how, len(exits.depths) - 1
  full, never = exits.depths[-1], (math.inf,) * early
  found = {(("depth", depth),): Rule(depth, never) for depth in exits.depths[:-1]}
  if early:
    found |= {(("threshold", value),): Rule(full, (value,) * early) for value in how.thresholds}
    plans = [how.per_exit[start : start + early] for start in range(0, len(how.per_exit), early)]
    found |= {(("plan", number),): Rule(full, plan) for number, plan in enumerate(plans, 1)}
  return {**found, (("depth", full),): Rule(full, never)}


def fixed(rule: Rule) -> bool:
  """Whether no token leaves but at the rule's depth; of a rule of plain numbers."""
  return min(rule.thresholds, default=math.inf) == math.inf


def choose(all_rules: Sequence[Rule], index: int | jax.Array) -> Rule:
  """The rule at an index; for a traced one, of traced numbers."""
  if isinstance(index, int):
    return all_rules[index]
  depths, thresholds = zip(*all_rules)
  return Rule(jnp.asarray(depths)[index], jnp.asarray(thresholds, jnp.float32)[index])


class _Walk(NamedTuple):
  """What is known of the tokens on their way up.

  Attributes:
    x: residual stream [b, t, d]. alive: which have not left, bool [b, t]. logits: of those that have, [b, t, v].
    previous: stream and logits at the exit before. agreed: int32 [b, t], see `Seen`.
  """

  x: jax.Array
  alive: jax.Array
  logits: jax.Array
  previous: tuple[jax.Array, jax.Array]
  agreed: jax.Array


# (exit, x [b, t, d], alive [b, t], state) -> (x after the layers before that exit, state)
Run = Callable[[int, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def leave(
  exits: Exits, params: Params, x: jax.Array, positions: jax.Array, real: jax.Array, rule: Rule, run: Run, state: Any
) -> tuple[jax.Array, list[jax.Array], Any]:
  """Tokens [b, t, d] on their way up, until each has left.

  Args:
    positions: int32 [b, t]. real: no padding, bool [b, t]. run: the layers before an exit; `state` is what it hands on.

  Returns:
    Logits [b, t, v] of the exit where each left, which tokens ran the layers before each exit (bool [b, t] each), and
    the last state.
  """
  vocab = jnp.zeros((*x.shape[:2], exits.config.vocab_size), jnp.float32)
  walk, ran = _Walk(x, real, vocab, (x, vocab), jnp.zeros(real.shape, jnp.int32)), []
  for which in range(len(exits.depths)):
    ran.append(walk.alive)
    x, state = run(which, walk.x, walk.alive, state)
    walk = walk._replace(x=x)
    # When all have left there is nobody to ask, so the head is not run either.
    ask = lambda walk, which=which: _ask(exits, params, which, walk, positions, rule)
    walk = jax.lax.cond(jnp.any(walk.alive), ask, lambda walk: walk, walk)
  return walk.logits, ran, state


def _ask(exits: Exits, params: Params, which: int, walk: _Walk, positions: jax.Array, rule: Rule) -> _Walk:
  """Lets those leave at an exit that are sure; at the last one, all."""
  if which == len(exits.depths) - 1:
    logits = exits.head(params, which, walk.x)
    return walk._replace(logits=jnp.where(walk.alive[..., None], logits, walk.logits), alive=jnp.zeros_like(walk.alive))
  signal, head = SIGNALS[exits.how.signal], lambda: exits.head(params, which, walk.x)
  logits = head() if signal.reads_logits else None
  before, previous = walk.previous
  seen = Seen(logits, previous if which else None, walk.x, before, walk.agreed)
  value = signal.value(seen)
  limit = jnp.asarray(rule.thresholds, jnp.float32)[which] * decay(exits.how, positions)
  goes = walk.alive & ((value > limit) | (exits.depths[which] >= rule.depth))
  if logits is None:  # the head is for those that leave, if any does
    out = jax.lax.cond(jnp.any(goes), lambda: jnp.where(goes[..., None], head(), walk.logits), lambda: walk.logits)
  else:
    out = jnp.where(goes[..., None], logits, walk.logits)
  agreed = value.astype(jnp.int32) if exits.how.signal == "patience" else walk.agreed
  previous = previous if logits is None else logits
  return walk._replace(alive=walk.alive & ~goes, logits=out, previous=(walk.x, previous), agreed=agreed)


def decay(how: Exiting, positions: jax.Array) -> jax.Array | float:
  """Factor of a threshold at positions [b, t] (CALM, Section 3.3)."""
  if not how.decay:
    return 1.0
  return 1 - how.decay + how.decay * jnp.exp(-how.decay_rate * positions / how.decay_length)


def realised(exits: Exits, ran: Sequence[jax.Array], real: jax.Array) -> Mapping[str, SumCount]:
  """Share of the tokens that ran the layers before each exit, `ran/<depth>`, and layers of a token, `layers`."""
  number = jnp.sum(real, dtype=jnp.float32)
  tokens = [jnp.sum(some & real, dtype=jnp.float32) for some in ran]
  layers = sum((stop - start) * some for (start, stop), some in zip(exits.segments, tokens))
  return {f"ran/{depth}": (some, number) for depth, some in zip(exits.depths, tokens)} | {"layers": (layers, number)}


def one_shot(exits: Exits, params: Params, batch: Batch, rule: Rule) -> tuple[jax.Array, Mapping[str, SumCount]]:
  """Logits [b, t, v] of whole rows, each token's of the exit where it leaves; and what was realised."""
  config, kv = exits.config, exits.how.kv
  x, context = exits.model.apply({"params": params}, batch, method="embed")

  def run(which: int, x: jax.Array, alive: jax.Array, last):
    start, stop = exits.segments[which]
    layers = jax.tree.map(lambda leaf: leaf[start:stop], params["layers"])
    everyone = jnp.ones_like(alive)
    return visits.one_shot(config, layers, x, context, *((everyone, "project") if kv == "exact" else (alive, kv)), last)

  everyone = jnp.ones(x.shape[:2], bool)  # padding too, which nobody sees, as in the plain model
  logits, ran, _ = leave(exits, params, x, batch["positions"], everyone, rule, run, visits.nothing(config, x))
  found = realised(exits, ran, batch["segment_ids"] > 0)
  if kv == "exact":
    found["layer_tokens"] = lazy_layers(exits, ran, batch["segment_ids"]), found["layers"][1]
  return logits, found


def lazy_layers(exits: Exits, ran: Sequence[jax.Array], segment_ids: jax.Array) -> jax.Array:
  """Layers run by lazy resume, summed over tokens: each as deep as it or a later one of its document goes."""
  depth = sum((stop - start) * some.astype(jnp.int32) for (start, stop), some in zip(exits.segments, ran))
  # Documents follow each other, so the deepest from here on is in one's own if every earlier document stands higher.
  order = jnp.where(segment_ids > 0, segment_ids, jnp.max(segment_ids) + 1)  # padding is last
  above = (exits.depths[-1] + 1) * (jnp.max(order) - order)
  deepest = jax.lax.cummax(depth + above, axis=1, reverse=True) - above
  return jnp.sum(deepest * (segment_ids > 0), dtype=jnp.float32)


class Cache(NamedTuple):
  """Of each layer, and how many tokens each row holds, int32 [b]."""

  layers: tuple[visits.Cache, ...]
  lengths: jax.Array


def decoder(exits: Exits, params: Params, rule: Rule) -> tuple[Params, Callable, Callable]:
  """Parameters, `empty_cache` and `step`, as `adaptive.methods.contract.Decoder` has them."""
  config, kv = exits.config, exits.how.kv
  params = decoding.unstacked(config, params)

  def empty_cache(batch_size: int, slots: int) -> Cache:
    layers = tuple(visits.empty(config, kv, batch_size, slots) for _ in range(config.num_layers))
    return Cache(layers, jnp.zeros((batch_size,), jnp.int32))

  def step(params: Params, tokens: jax.Array, counts: jax.Array, cache: Cache):
    length, slots = tokens.shape[1], cache.layers[0].kv.key.shape[2]
    context = decoding.context_of(config, cache.lengths, counts, length, slots)
    offsets = jnp.arange(length, dtype=jnp.int32)[None]
    real = offsets < counts[:, None]

    def run(which: int, x: jax.Array, alive: jax.Array, state):
      caches, last = state
      start, stop = exits.segments[which]
      found = visits.step(config, params["layers"][start:stop], x, context, alive, kv, caches[start:stop], last)
      return found[0], ((*caches[:start], *found[1], *caches[stop:]), found[2])

    x = exits.model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
    state = cache.layers, visits.nothing(config, x)
    positions = cache.lengths[:, None] + offsets
    logits, ran, (layers, _) = leave(exits, params, x, positions, real, rule, run, state)
    logits = decoding.last_of(logits, counts)[:, 0]
    return logits, Cache(layers, cache.lengths + counts), realised(exits, ran, real)

  return params, empty_cache, step


def cost(exits: Exits, rule: Rule, seq_len: int, realised: Mapping[str, SumCount]) -> costs.Cost:
  """A sub-model's cost from the shares that were measured; without them as if no token left before the rule's depth.

  Heads are counted at every exit that a token passes, where the signal reads logits. Keys and values of layers that a
  token did not run cost their projections under `project`; under `exact` the layers are run later, if a later token of
  the row needs them. A `hole` is still counted as attended to.
  """
  config, how = exits.config, exits.how
  if fixed(rule):  # stands alone, without the layers above the dial's depth
    config = dataclasses.replace(config, num_layers=rule.depth)
    return costs.dense_cost(config, seq_len)
  dense = costs.dense_cost(config, seq_len)
  ran = [realised[f"ran/{depth}"] if realised else (1.0, 1.0) for depth in exits.depths]
  shares = [float(some) / float(number) for some, number in ran]
  layer = costs.layer_flops(config, (seq_len + 1) / 2)
  away = costs.key_value_flops(config) if how.kv == "project" else 0.0
  layers = sum(
    (stop - start) * (share * layer + (1 - share) * away) for share, (start, stop) in zip(shares, exits.segments)
  )
  if "layer_tokens" in realised:
    layers = layer * float(realised["layer_tokens"][0]) / float(realised["layer_tokens"][1])
  heads = sum(shares) if SIGNALS[how.signal].reads_logits else 1.0
  return dataclasses.replace(dense, flops_per_token=layers + heads * costs.head_flops(config))


def norm_and_matrix(x: jax.Array, scale: jax.Array, matrix: jax.Array, eps: float) -> jax.Array:
  """A head of an exit's own: RMSNorm, then a matrix [d, v]; float32 logits."""
  return jnp.einsum("btd,dv->btv", rms_norm(x, scale, eps), matrix.astype(x.dtype), preferred_element_type=jnp.float32)
