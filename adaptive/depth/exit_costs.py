"""What early exit costs, from the shares of the tokens that were measured at every exit."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from adaptive import cost as costs
from adaptive.depth.exits import Exits, Rule, fixed, repeated, stands_alone
from adaptive.losses import SumCount


def layers_run(exits: Exits, ran: Sequence[jax.Array], segment_ids: jax.Array) -> jax.Array:
  """Layers that `adaptive.depth.lazy` runs for whole documents, fed token by token, summed over their tokens.

  A scan over the tokens carries how deep those stand that wait, as the decoder's cache does: a token takes along all
  that wait, and with no place left it goes all the way. While there is always a place, `exact` comes to
  sum over t of max over t' >= t of depth(t'); with no place left it runs more than that.

  Args:
    ran: which tokens ran the layers before each exit, bool [b, t] each. segment_ids: int32 [b, t]; 0 is padding, last.
  """
  full, again = exits.depths[-1], exits.how.kv == "recompute"
  depth = sum((stop - start) * some.astype(jnp.int32) for (start, stop), some in zip(exits.segments, ran))

  def token(carry, seen):
    places, before = carry  # [b, wait]; `full` where none waits
    depth, segment = seen
    places = jnp.where((segment == before)[:, None], places, full)
    free = places == full
    depth = jnp.where(jnp.any(free, axis=1), depth, full)[:, None]
    begins = jnp.where(free, full, 0) if again else places
    layers = depth[:, 0] + jnp.sum(jnp.maximum(depth - begins, 0), axis=1)
    place = free & (jnp.cumsum(free, axis=1) == 1)
    return (jnp.where(place, depth, jnp.maximum(places, depth)), segment), layers * (segment > 0)

  start = jnp.full((len(segment_ids), exits.how.wait), full), segment_ids[:, 0]
  _, layers = jax.lax.scan(token, start, (depth.T, segment_ids.T))
  return jnp.sum(layers, dtype=jnp.float32)


def cost(exits: Exits, rule: Rule, seq_len: int, realised: Mapping[str, SumCount]) -> costs.Cost:
  """A sub-model's cost from the shares that were measured; without them as if no token left before the rule's depth.

  Heads are counted at every exit that a token passes, where the signal reads logits. Keys and values of layers that a
  token did not run cost their projections under `project`; under `exact` and `recompute` the layers are run later, if a
  later token of the row needs them or no more may wait. A `hole` is still counted as attended to, not as written.

  Parameters are those of the sub-model alone; only the full model's `params_total` is all that the run has.
  """
  config, how = exits.config, exits.how
  passes = sum(depth <= rule.depth for depth in exits.depths) if fixed(rule) else len(exits.depths)
  full, alone = rule.depth == exits.depths[-1], stands_alone(exits, rule)
  # An exit that stands alone has its own head in place of the model's.
  tied = config.tied_embeddings and not (alone and exits.own_params and not full)
  dense = costs.dense_cost(dataclasses.replace(config, num_layers=rule.depth, tied_embeddings=tied), seq_len)
  dense = costs.with_params(dense, -repeated(exits, rule.depth) * costs.layer_params(config))
  added = exits.added_params + exits.own_params * (len(exits.depths) - 1)
  if not alone:
    dense = costs.with_params(dense, added)
  elif full:
    dense = dataclasses.replace(dense, params_total=dense.params_total + added)
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
  written = dense.kv_bytes_per_token
  if how.kv == "hole":
    visits = sum((stop - start) * share for share, (start, stop) in zip(shares, exits.segments))
    written = round(written * visits / exits.depths[-1])
  return dataclasses.replace(dense, flops_per_token=total, kv_bytes_per_token=written)
