"""Early exits: a token leaves the stack of layers at the first exit where it is sure enough, or where the dial says.

One walk over the exits (`leave`) serves both faces: `one_shot` on whole rows, where all is computed and masked, and
`decoder`, where layers that no row needs are left out. What tokens that have left leave to others in the layers above
is a rule of `adaptive.depth.visits`, or keys and values are those of the full model, as if no token had left: `exact`
takes a token up when a later one needs it, `recompute` feeds all that left again with every token, as EE-LLM does.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from adaptive import cost as costs
from adaptive import subnet
from adaptive.backbone import decoding
from adaptive.backbone.layers import rms_norm
from adaptive.backbone.transformer import Batch, Params, Transformer
from adaptive.config import ModelConfig, require
from adaptive.depth import visits
from adaptive.depth.signals import SIGNALS, Seen, Signal
from adaptive.losses import SumCount

KeyValues = visits.KeyValues
_FULL_KEYS = ("exact", "recompute")  # whole rows are then those of the plain model
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
      0 is none, the paper takes 0.1. decay_rate: `rate`; 4 in the paper. decay_length: tokens.
    kv: what later tokens attend to in layers that a token did not run: a rule of `adaptive.depth.visits` (`latest` is
      for layers that run several times), `exact`, or `recompute`.
    wait: with `exact` and `recompute`, how many tokens of a row may wait below layers that they did not run, see
      `adaptive.depth.lazy`.
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
  found = {(exits.shown(depth),): Rule(depth, never) for depth in exits.depths[:-1]}
  if early:
    found |= {(("threshold", value),): Rule(full, (value,) * early) for value in how.thresholds}
    plans = [how.per_exit[start : start + early] for start in range(0, len(how.per_exit), early)]
    found |= {(("plan", number),): Rule(full, plan) for number, plan in enumerate(plans, 1)}
  return {**found, (exits.shown(full),): Rule(full, never)}


def fixed(rule: Rule) -> bool:
  """Whether no token leaves but at the rule's depth; of a rule of plain numbers."""
  return min(rule.thresholds, default=math.inf) == math.inf


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


class Walk(NamedTuple):
  """What is known of the tokens on their way up.

  Attributes:
    x: residual stream [b, t, d]. alive: which have not left, bool [b, t]. logits: of those that have, [b, t, v].
    previous: stream and logits at the exit before.
    memory: of the signal, float32 [b, t]. mean: of the streams so far, [b, t, d]; None where the signal averages none.
  """

  x: jax.Array
  alive: jax.Array
  logits: jax.Array
  previous: tuple[jax.Array, jax.Array]
  memory: jax.Array
  mean: jax.Array | None


def begin(exits: Exits, x: jax.Array, real: jax.Array) -> Walk:
  """Of tokens [b, t, d] below all layers, those that are no padding, bool [b, t]."""
  vocab = jnp.zeros((*x.shape[:2], exits.config.vocab_size), jnp.float32)
  mean = jnp.zeros_like(x) if exits.signal({}, 0).averages else None
  return Walk(x, real, vocab, (x, vocab), jnp.zeros(real.shape, jnp.float32), mean)


def look(
  exits: Exits, params: Params, which: int, walk: Walk, positions: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
  """What an early exit says of tokens that have come there.

  Returns:
    The signal [b, t], logits [b, t, v] if it reads them, what the head reads of a token that leaves [b, t, d], and what
    the mean is for one that stays.
  """
  signal, (before, previous) = exits.signal(params, which), walk.previous
  logits = exits.head(params, which, walk.x) if signal.reads_logits else None
  value = signal.value(Seen(logits, previous if which else None, walk.x, before, positions, walk.memory))
  if not signal.averages:
    return value, logits, walk.x, walk.mean
  grown = signal.remember(value, walk.memory) - walk.memory
  return value, logits, _added(walk, 1 - walk.memory), _added(walk, grown)


def _added(walk: Walk, weight: jax.Array) -> jax.Array:
  """The mean with the present stream in it."""
  return walk.mean + weight[..., None].astype(walk.x.dtype) * walk.x


def last_read(walk: Walk) -> jax.Array:
  """What the model's own head reads of tokens that have come to it."""
  return walk.x if walk.mean is None else _added(walk, 1 - walk.memory)


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
  walk, ran = begin(exits, x, real), []
  for which in range(len(exits.depths)):
    ran.append(walk.alive)
    x, state = run(which, walk.x, walk.alive, state)
    walk = walk._replace(x=x)
    # When all have left there is nobody to ask, so the head is not run either.
    ask = lambda walk, which=which: _ask(exits, params, which, walk, positions, rule)
    walk = jax.lax.cond(jnp.any(walk.alive), ask, lambda walk: walk, walk)
  return walk.logits, ran, state


def _ask(exits: Exits, params: Params, which: int, walk: Walk, positions: jax.Array, rule: Rule) -> Walk:
  """Lets those leave at an exit that are sure, or end their text; at the last one, all."""
  over = _over(exits, params, which, walk, positions, rule)
  if which == len(exits.depths) - 1:
    logits = _spoken(exits, over, exits.head(params, which, last_read(walk)))
    return walk._replace(logits=jnp.where(walk.alive[..., None], logits, walk.logits), alive=jnp.zeros_like(walk.alive))
  value, logits, read, mean = look(exits, params, which, walk, positions)
  limit = jnp.asarray(rule.thresholds, jnp.float32)[which] * decay(exits.how, positions)
  goes = walk.alive & ((value > limit) | (exits.depths[which] >= rule.depth) | over)
  spoken = lambda logits: jnp.where(goes[..., None], _spoken(exits, over, logits), walk.logits)
  if logits is None:  # the head is for those that leave, if any does
    out = jax.lax.cond(jnp.any(goes), lambda: spoken(exits.head(params, which, read)), lambda: walk.logits)
  else:
    out = spoken(logits)
  previous = walk.previous[1] if logits is None else logits
  memory = exits.signal(params, which).remember(value, walk.memory)
  return Walk(walk.x, walk.alive & ~goes, out, (walk.x, previous), memory, mean)


def _over(exits: Exits, params: Params, which: int, walk: Walk, positions: jax.Array, rule: Rule) -> jax.Array:
  """Which tokens end their text at an exit, bool [b, t]; none where the rule lets none leave by what is seen."""
  if exits.ends is None:
    return jnp.zeros_like(walk.alive)
  asks = jnp.any(jnp.asarray(rule.thresholds, jnp.float32) < jnp.inf)
  return asks & exits.ends.says(params, which, walk.x, positions)


def _spoken(exits: Exits, over: jax.Array, logits: jax.Array) -> jax.Array:
  """Logits [b, t, v] with no choice left where a text ends: the others' probabilities round to 0 in float32."""
  if exits.ends is None:
    return logits
  certain = jnp.where(jnp.arange(logits.shape[-1]) == exits.ends.token, 0.0, -100.0)
  return jnp.where(over[..., None], certain[None, None], logits)


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


# (first layer, last + 1, x [b, t, d], who runs them [b, t], state) -> (x, state)
Span = Callable[[int, int, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def run_of(exits: Exits, params: Params, positions: jax.Array, span: Span) -> Run:
  """The layers before an exit, whatever runs some layers, with what a loop does around them.

  The state is a pair: that of `span`, and e of the loop, whatever it is before it begins.
  """

  def run(which: int, x: jax.Array, alive: jax.Array, state: tuple[Any, jax.Array]):
    (start, stop), loop, (inner, e) = exits.segments[which], exits.loop, state
    if loop is None:
      x, inner = span(start, stop, x, alive, inner)
      return x, (inner, e)
    if which == 0:
      e, inner = span(start, loop.lead, x, alive, inner) if loop.lead else (x, inner)
      x, start = loop.start(params, e, positions), loop.lead
    enter = lambda x, e: loop.enter(params, x, e)
    if exits.how.kv == "project":  # then those that stay away need it too, for their keys
      y = enter(x, e)
    else:
      y = jax.lax.cond(jnp.any(alive), enter, lambda x, e: x, x, e)
    y, inner = span(start, stop, y, alive, inner)
    return jnp.where(alive[..., None], y, x), (inner, e)

  return run


def one_shot(exits: Exits, params: Params, batch: Batch, rule: Rule) -> tuple[jax.Array, Mapping[str, SumCount]]:
  """Logits [b, t, v] of whole rows, each token's of the exit where it leaves; and what was realised."""
  exact = exits.how.kv in _FULL_KEYS
  x, climb, state = whole_rows(exits, params, batch, "project" if exact else exits.how.kv)
  everyone = jnp.ones(x.shape[:2], bool)  # padding too, which nobody sees, as in the plain model
  run = (lambda which, x, alive, state: climb(which, x, everyone, state)) if exact else climb
  logits, ran, _ = leave(exits, params, x, batch["positions"], everyone, rule, run, state)
  found = realised(exits, ran, batch["segment_ids"] > 0)
  if exact:
    count = {"exact": lazy_layers, "recompute": recomputed_layers}[exits.how.kv]
    found["layer_tokens"] = count(exits, ran, batch["segment_ids"]), found["layers"][1]
  return logits, found


def whole_rows(exits: Exits, params: Params, batch: Batch, kv: KeyValues) -> tuple[jax.Array, Run, Any]:
  """Embedded tokens [b, t, d] of whole rows, what takes them up, and the state with which it begins."""
  x, context = exits.model.apply({"params": params}, batch, method="embed")

  def span(start: int, stop: int, x: jax.Array, alive: jax.Array, books: tuple):
    for piece, book in visits.sharing_a_book(exits.layers, start, stop, kv):
      layers = subnet.pick(params["layers"], exits.layers[piece])
      x, own = visits.one_shot(exits.config, layers, x, context, alive, visits.rule_of(kv), books[book])
      books = (*books[:book], own, *books[book + 1 :])
    return x, books

  return x, run_of(exits, params, batch["positions"], span), (visits.books(exits.config, x, exits.layers, kv), x)


def streams(exits: Exits, params: Params, batch: Batch) -> list[jax.Array]:
  """Residual stream at every exit, [b, t, d] each, when nobody leaves."""
  x, run, state = whole_rows(exits, params, batch, "project")
  everyone, found = jnp.ones(x.shape[:2], bool), []
  for which in range(len(exits.depths)):
    x, state = run(which, x, everyone, state)
    found.append(x)
  return found


def _depth(exits: Exits, ran: Sequence[jax.Array]) -> jax.Array:
  """Layers of each token, int32 [b, t]."""
  return sum((stop - start) * some.astype(jnp.int32) for (start, stop), some in zip(exits.segments, ran))


def recomputed_layers(exits: Exits, ran: Sequence[jax.Array], segment_ids: jax.Array) -> jax.Array:
  """Layers run when each token takes along all of its document that have left since one went all the way."""

  def token(carry, seen):
    waiting, before = carry
    depth, segment = seen
    waiting = jnp.where(segment == before, waiting, 0)
    layers = depth * (waiting + 1) * (segment > 0)
    return (jnp.where(depth == exits.depths[-1], 0, waiting + 1), segment), layers

  start = jnp.zeros_like(segment_ids[:, 0]), segment_ids[:, 0]
  _, layers = jax.lax.scan(token, start, (_depth(exits, ran).T, segment_ids.T))
  return jnp.sum(layers, dtype=jnp.float32)


def lazy_layers(exits: Exits, ran: Sequence[jax.Array], segment_ids: jax.Array) -> jax.Array:
  """Layers run by lazy resume, summed over tokens: each as deep as it or a later one of its document goes."""
  depth = _depth(exits, ran)
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
  config, kv, rule_of_visits = exits.config, exits.how.kv, visits.rule_of(exits.how.kv)
  params = decoding.unstacked(config, params, exits.kept)

  def empty_cache(batch_size: int, slots: int) -> Cache:
    layers = tuple(visits.empty(config, rule_of_visits, batch_size, slots) for _ in range(exits.depths[-1]))
    return Cache(layers, jnp.zeros((batch_size,), jnp.int32))

  def step(params: Params, tokens: jax.Array, counts: jax.Array, cache: Cache):
    length, slots = tokens.shape[1], cache.layers[0].kv.key.shape[2]
    context = decoding.context_of(config, cache.lengths, counts, length, slots)
    offsets = jnp.arange(length, dtype=jnp.int32)[None]
    real = offsets < counts[:, None]

    def span(start: int, stop: int, x: jax.Array, alive: jax.Array, state):
      caches, books = state
      for piece, book in visits.sharing_a_book(exits.layers, start, stop, kv):
        layers = [params["layers"][layer] for layer in exits.layers[piece]]
        x, after, own = visits.step(config, layers, x, context, alive, rule_of_visits, caches[piece], books[book])
        caches = (*caches[: piece.start], *after, *caches[piece.stop :])
        books = (*books[:book], own, *books[book + 1 :])
      return x, (caches, books)

    x = exits.model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
    positions = cache.lengths[:, None] + offsets
    run, state = run_of(exits, params, positions, span), ((cache.layers, visits.books(config, x, exits.layers, kv)), x)
    logits, ran, ((layers, _), _) = leave(exits, params, x, positions, real, rule, run, state)
    logits = decoding.last_of(logits, counts)[:, 0]
    return logits, Cache(layers, cache.lengths + counts), realised(exits, ran, real)

  return params, empty_cache, step


def cost(exits: Exits, rule: Rule, seq_len: int, realised: Mapping[str, SumCount]) -> costs.Cost:
  """A sub-model's cost from the shares that were measured; without them as if no token left before the rule's depth.

  Heads are counted at every exit that a token passes, where the signal reads logits. Keys and values of layers that a
  token did not run cost their projections under `project`; under `exact` and `recompute` the layers are run later, if a
  later token of the row needs them. A `hole` is still counted as attended to.
  """
  config, how = exits.config, exits.how
  passes = sum(depth <= rule.depth for depth in exits.depths) if fixed(rule) else len(exits.depths)
  # An exit that stands alone has its own head in place of the model's.
  alone = exits.own_params > 0 and fixed(rule) and rule.depth < exits.depths[-1]
  small = dataclasses.replace(config, num_layers=rule.depth, tied_embeddings=config.tied_embeddings and not alone)
  dense = costs.dense_cost(small, seq_len)
  added = exits.added_params + (0 if alone else exits.own_params * (len(exits.depths) - 1))
  dense = costs.with_params(dense, added - repeated(exits, rule.depth) * costs.layer_params(config))
  loop = exits.loop.flops if exits.loop else 0.0
  if fixed(rule):  # stands alone, without the layers above the dial's depth
    weighed = exits.learned_flops * (passes - 1) if exits.signal({}, 0).averages else 0.0
    return dataclasses.replace(dense, flops_per_token=dense.flops_per_token + passes * loop + weighed)
  ran = [realised[f"ran/{depth}"] if realised else (1.0, 1.0) for depth in exits.depths]
  shares = [float(some) / float(number) for some, number in ran]
  layer = costs.layer_flops(config, (seq_len + 1) / 2)
  away = costs.key_value_flops(config) if how.kv == "project" else 0.0
  layers = sum(
    (stop - start) * (share * layer + (1 - share) * away) for share, (start, stop) in zip(shares, exits.segments)
  )
  if "layer_tokens" in realised:
    layers = layer * float(realised["layer_tokens"][0]) / float(realised["layer_tokens"][1])
  heads = sum(shares) if exits.reads_logits else 1.0
  asked = sum(exits.asked_flops(which) * share for which, share in enumerate(shares))
  entered = len(shares) if how.kv == "project" else sum(shares)
  total = layers + heads * costs.head_flops(config) + asked + entered * loop
  return dataclasses.replace(dense, flops_per_token=total)


def repeated(exits: Exits, depth: int) -> int:
  """How many of the first layers are runs of a layer that has run before, and bring no parameters."""
  return depth - len(set(exits.layers[:depth]))


def norm_and_matrix(x: jax.Array, scale: jax.Array, matrix: jax.Array, eps: float) -> jax.Array:
  """A head of an exit's own: RMSNorm, then a matrix [d, v]; float32 logits."""
  return jnp.einsum("btd,dv->btv", rms_norm(x, scale, eps), matrix.astype(x.dtype), preferred_element_type=jnp.float32)
