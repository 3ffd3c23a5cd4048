"""Plans that prompts make: a document's prompt runs every layer, and says once which layers the rest of it leaves out.

The first tokens of a document, a fixed number, are its prompt. At each routed layer, which is any but the first and the
last, every token of the prompt gives a score of the residual stream that enters; sigmoid(the mean of the scores) is the
probability that the layer is run, and later tokens of the document run it where that is above a threshold. Where scores
are linear, their mean is the score of the mean stream, so a cache has to keep one sum for each layer and no stream.

After its prompt a document's tokens are in a layer all together or not at all. So nobody looks for the keys of a token
that is away, and whole rows need no rule for them; in a cache such tokens leave a `hole` (`adaptive.depth.visits`).
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.backbone import decoding
from adaptive.backbone.attention import Context
from adaptive.backbone.transformer import REMAT_POLICIES, Batch, Block, Params, Transformer
from adaptive.config import ModelConfig
from adaptive.depth import chance, visits
from adaptive.losses import SumCount

Estimator = Literal["none", "straight_through", "soft"]


class Plans(NamedTuple):
  """How prompts plan.

  Attributes:
    prompt_tokens: of each document.
    threshold: of the probability; strictly above it a layer is run. May be traced.
    score: (params, which routed layer, x [b, t, d]) -> float32 [b, t], linear in x.
  """

  prompt_tokens: int
  threshold: float | jax.Array
  score: Callable[[Params, int | jax.Array, jax.Array], jax.Array]

  def prompt(self, positions: jax.Array) -> jax.Array:
    """Which tokens are of their document's prompt, by their positions in it."""
    return positions < self.prompt_tokens


def gate(probability: jax.Array, threshold: float | jax.Array, estimator: Estimator) -> jax.Array:
  """How much of a layer's update is made, float32: 1 above the threshold, else 0; `soft`: the probability itself.

  With `straight_through` the value is the hard one, exactly, and the gradient is that of the probability.
  """
  if estimator == "soft":
    return probability
  hard = (probability > threshold).astype(jnp.float32)
  return hard if estimator == "none" else hard + (probability - jax.lax.stop_gradient(probability))


def one_shot(
  model: Transformer,
  params: Params,
  batch: Batch,
  plans: Plans,
  estimator: Estimator = "none",
  rates: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Whole rows: every token is computed in every layer, and what it leaves out is masked.

  Args:
    rates: of each routed layer, the share of the documents [l - 2] that run it after their prompts: chance decides.

  Returns:
    Float32 logits [b, t, v], and the gates of the routed layers, float32 [l - 2, b, t], 1 for the prompts.
  """
  config, last = model.config, model.config.num_layers - 1
  x, context = model.apply({"params": params}, batch, method="embed")
  prompt = plans.prompt(batch["positions"])
  # A token sees the prompt of its own document, as far as it lies before it.
  seen = context.mask[:, 0] & prompt[:, None]
  cut = lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], params["layers"])
  if rates is not None:  # a document's noise is of its prompt
    places = chance.places(x, batch["positions"])
    documents = jnp.sum(jnp.where(seen, places[:, None], 0), axis=-1, dtype=jnp.int32)

  def layer(x, inputs):
    which, weights = inputs
    scores = plans.score(params, which, x)
    mean = jnp.sum(jnp.where(seen, scores[:, None], 0.0), axis=-1) / plans.prompt_tokens
    later = gate(jax.nn.sigmoid(mean), plans.threshold, estimator)
    if rates is not None:
      later = (chance.noise(documents, which) < rates[which]).astype(jnp.float32)
    gates = jnp.where(prompt, 1.0, later)
    y, _ = Block(config, parent=None).apply({"params": weights}, x, context)
    part = gates.astype(x.dtype)[..., None]
    return part * y + (1 - part) * x, gates  # exactly y or x, where the gate is 1 or 0

  if config.remat != "none":
    layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.remat])
  x = _everyone(config, cut(0, 1), x, context)
  x, gates = jax.lax.scan(layer, x, (jnp.arange(last - 1), cut(1, last)), unroll=config.unroll(last - 1))
  x = _everyone(config, cut(last, last + 1), x, context)
  return model.apply({"params": params}, x, method="head"), gates


def _everyone(config: ModelConfig, layers: Params, x: jax.Array, context: Context) -> jax.Array:
  """Layers that all tokens run."""
  everyone = jnp.ones(x.shape[:2], bool)
  return visits.one_shot(config, layers, x, context, everyone, "project", visits.nothing(config, x))[0]


class Cache(NamedTuple):
  """What the past left behind.

  Attributes:
    layers: of each layer. scores: sums over each row's prompt, so far, by routed layer, float32 [l - 2, b].
    lengths: tokens that each row holds, int32 [b].
  """

  layers: tuple[visits.Cache, ...]
  scores: jax.Array
  lengths: jax.Array


def decoder(
  model: Transformer, params: Params, plans: Plans, kept: tuple[str, ...] = ()
) -> tuple[Params, Callable, Callable]:
  """Parameters, `empty_cache` and `step`, as `adaptive.methods.contract.Decoder` has them.

  Args:
    kept: names of the parameters that scores read, which keep their dtype.
  """
  config, full = model.config, model.config.num_layers
  params = decoding.unstacked(config, params, kept)

  def empty_cache(batch_size: int, slots: int) -> Cache:
    layers = tuple(visits.empty(config, "hole", batch_size, slots) for _ in range(full))
    return Cache(layers, jnp.zeros((full - 2, batch_size)), jnp.zeros((batch_size,), jnp.int32))

  def step(params: Params, tokens: jax.Array, counts: jax.Array, cache: Cache):
    length, slots = tokens.shape[1], cache.layers[0].kv.key.shape[2]
    context = decoding.context_of(config, cache.lengths, counts, length, slots)
    offsets = jnp.arange(length, dtype=jnp.int32)[None]
    real, prompt = offsets < counts[:, None], plans.prompt(cache.lengths[:, None] + offsets)
    x = model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
    layers, sums, ran, nothing = [], [], [], visits.nothing(config, x)
    for layer, weights in enumerate(params["layers"]):
      active = real
      if 0 < layer < full - 1:
        scores = plans.score(params, layer - 1, x)
        sums.append(cache.scores[layer - 1] + jnp.sum(jnp.where(real & prompt, scores, 0.0), axis=1))
        # A row with a token after its prompt has all of the prompt, here or in its cache.
        goes = gate(jax.nn.sigmoid(sums[-1] / plans.prompt_tokens), plans.threshold, "none") > 0
        active = real & (prompt | goes[:, None])
        ran.append(active)
      x, (own,), _ = visits.step(config, (weights,), x, context, active, "hole", (cache.layers[layer],), nothing)
      layers.append(own)
    logits = model.apply({"params": params}, decoding.last_of(x, counts), method="head")[:, 0]
    return logits, Cache(tuple(layers), jnp.stack(sums), cache.lengths + counts), realised(ran, real, prompt)

  return params, empty_cache, step


def realised(ran: jax.Array | list[jax.Array], real: jax.Array, prompt: jax.Array) -> Mapping[str, SumCount]:
  """Share of the tokens that ran each routed layer, `ran/<layer>`, that are prompts, and layers of a token, `layers`.

  Args:
    ran: of the routed layers, bool [b, t] each. real: no padding, bool [b, t]. prompt: which are of one, bool [b, t].
  """
  number = jnp.sum(real, dtype=jnp.float32)
  tokens = [jnp.sum(some & real, dtype=jnp.float32) for some in ran]
  found = {f"ran/{layer}": (some, number) for layer, some in enumerate(tokens, 1)}
  prompts = jnp.sum(prompt & real, dtype=jnp.float32)
  return found | {"prompt": (prompts, number), "layers": (2 * number + sum(tokens), number)}
