"""Dr.LLM's routers in NumPy, one row, one layer and one window after the other; layers are the backbone's blocks."""

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.backbone.attention import Context, rope_table
from adaptive.backbone.transformer import Block, Transformer


def window_tokens(number_of_tokens, windows, split):
  """Which tokens each window of a prompt takes the mean of."""
  used = min(windows, number_of_tokens)
  if split == "paper":
    size = number_of_tokens // used
    return [list(range(i * size, (i + 1) * size)) for i in range(used)]
  return [[i for i in range(number_of_tokens) if i * used // number_of_tokens == w] for w in range(used)]


def logits(router, stream, windows, split):
  """Of one prompt's stream [t, d]; a router is its parameters of one layer, in float64."""
  each = []
  for tokens in window_tokens(len(stream), windows, split):
    hidden = np.mean(stream[tokens], axis=0) @ router["hidden"] + router["hidden_bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    each.append(hidden @ router["weight"] + router["bias"])
  return np.mean(each, axis=0)


def decide(logits, budget):
  """Class at a budget, by the definition of the four corners."""
  router = np.exp(logits - logits.max())
  corners = {-1.0: np.eye(3)[0], -0.5: router / router.sum(), 0.5: np.eye(3)[1], 1.0: np.eye(3)[2]}
  low = max(corner for corner in corners if corner <= budget)
  high = min(corner for corner in corners if corner >= budget)
  share = 0.0 if low == high else (budget - low) / (high - low)
  return int(np.argmax((1 - share) * corners[low] + share * corners[high]))


def row(config, params, tokens, prompt, choose):
  """One document without padding: float32 logits [t, v] and how often each layer was run.

  Args:
    prompt: tokens of the prompt. choose: (layer, the prompt's stream [p, d] that enters it) -> how often it runs.
  """
  model = Transformer(config)
  tokens = jnp.asarray(tokens)[None]
  positions = jnp.arange(tokens.shape[1])[None]
  context = Context(*rope_table(config, positions), jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None, None])
  x = params["embedding"]["table"][tokens]
  visits = []
  for layer in range(config.num_layers):
    visits.append(choose(layer, np.asarray(x[0, :prompt], np.float64)))
    weights = jax.tree.map(lambda leaf, i=layer: leaf[i], params["layers"])
    for _ in range(visits[-1]):
      x, _ = Block(config).apply({"params": weights}, x, context)
  rest = {name: part for name, part in params.items() if name != "routers"}
  return np.asarray(model.apply({"params": rest}, x, method="head"))[0], visits


def routed(config, params, tokens, prompt, budget, windows=8, split="even"):
  """`row` with the routers' own choice."""
  routers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["routers"])
  of = lambda layer: {name: leaf[layer] for name, leaf in routers.items()}
  choose = lambda layer, stream: decide(logits(of(layer), stream, windows, split), budget)
  return row(config, params, tokens, prompt, choose)
