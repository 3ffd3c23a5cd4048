"""Three ways to run a sub-network of the backbone, which agree; see `docs/design.md`, "One sub-model, three executors".

| executor | compiles             | saves compute | for |
|----------|----------------------|---------------|-----|
| `static` | once per sub-network | yes           | few sub-networks, deployment, latency |
| `switch` | once for all         | yes           | hundreds of sub-networks, sampling per step |
| `mask`   | once for all         | no            | tests, the reference |

All take the parent's plain parameter tree, and a batch as `Transformer` does, and return float32 logits [b, t, v].
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import subnet as subnets
from adaptive.backbone.attention import Context
from adaptive.backbone.transformer import REMAT_POLICIES, Batch, Block, Params, Transformer
from adaptive.config import ModelConfig
from adaptive.subnet import Subnet


class Choices(NamedTuple):
  """What each layer does, for each sub-network of a list: the one-compile executors index it by a traced number.

  Attributes:
    widths: the distinct (q_per_kv, d_ff) pairs, at most W.
    branch: int32 [n, l]; 0 skips the layer, 1 + w runs it at `widths[w]`.
  """

  widths: tuple[tuple[int, int], ...]
  branch: np.ndarray


def choices(config: ModelConfig, family: Sequence[Subnet]) -> Choices:
  """The table of a family of sub-networks. Their layers must be in the parent's order, each at most once."""
  widths = tuple(sorted({s.widths for s in family}))
  branch = np.zeros((len(family), config.num_layers), np.int32)
  for row, subnet in zip(branch, family):
    if list(subnet.layer_path) != sorted(set(subnet.layer_path)):
      raise ValueError(
        f"layer path {subnet.layer_path} repeats or reorders layers: only the static executor can run it"
      )
    row[list(subnet.layer_path)] = 1 + widths.index(subnet.widths)
  return Choices(widths, branch)


def static(config: ModelConfig, params: Params, batch: Batch, subnet: Subnet) -> jax.Array:
  """Cuts the sub-network out at trace time and runs it as the dense model that it is."""
  small = subnets.config_of(config, subnet)
  return Transformer(small).apply({"params": subnets.extract(config, params, subnet)}, batch)


def switch(config: ModelConfig, params: Params, batch: Batch, table: Choices, index: jax.Array) -> jax.Array:
  """One program for the whole family: each layer of the scan branches to a width, or to nothing.

  The layer is rematerialised in the backward pass, always and whole, whatever the model's `remat`: differentiating
  through a switch would otherwise store every branch's residuals for every layer (under `dots`, every branch's matrix
  products), which costs more time and memory than computing the layer again.
  """
  model = Transformer(config)
  x, context = model.apply({"params": params}, batch, method="embed")
  layer = jax.checkpoint(functools.partial(_switch_layer, config, table.widths), prevent_cse=False)
  branch = jnp.asarray(table.branch)[index]
  x, _ = jax.lax.scan(lambda x, inputs: (layer(x, context, *inputs), None), x, (params["layers"], branch))
  return model.apply({"params": params}, x, method="head")


def _switch_layer(config, widths, x: jax.Array, context: Context, layer: Params, branch: jax.Array) -> jax.Array:
  def at_width(q_per_kv: int, d_ff: int):
    block = Block(subnets.config_of(config, Subnet((0,), q_per_kv, d_ff)))

    def run(x: jax.Array, context: Context, layer: Params) -> jax.Array:
      return block.apply({"params": subnets.cut_widths(config, layer, q_per_kv, d_ff)}, x, context)[0]

    # Branches recompute one by one, too: the backward pass of a switch is else handed residuals of all its branches,
    # zeros for those that did not run. With the 20 of configs/sorted_net_160.py, 4 rows and two CPU cores the gradient
    # took 0.84 (full sub-model) and 0.34 (smallest) of the time and 51 MB of scratch memory in place of 121 MB.
    return jax.checkpoint(run, prevent_cse=False)

  skip = lambda x, context, layer: x
  return jax.lax.switch(branch, [skip, *(at_width(*w) for w in widths)], x, context, layer)


def mask(config: ModelConfig, params: Params, batch: Batch, table: Choices, index: jax.Array) -> jax.Array:
  """The whole model with the rest of the parameters silenced: the reference, which saves nothing."""
  branch = jnp.asarray(table.branch)[index]
  q_per_kv, d_ff = jnp.moveaxis(jnp.asarray(table.widths)[jnp.maximum(branch - 1, 0)], -1, 0)
  layers = subnets.mask_layers(config, params["layers"], branch > 0, q_per_kv, d_ff)
  return Transformer(config).apply({"params": {**params, "layers": layers}}, batch)


def exits(
  config: ModelConfig, params: Params, batch: Batch, depths: Sequence[int], dropped: jax.Array | None = None
) -> jax.Array:
  """Residual stream after each of the given numbers of layers, [e, b, t, d], in one forward pass (SoFT).

  Args:
    dropped: layer dropout: layers that are left out, bool [l], which are not computed; or for each row, bool [l, b],
      where what was computed is thrown away.
  """
  model = Transformer(config)
  x, context = model.apply({"params": params}, batch, method="embed")
  block = Block(config)
  run = lambda x, layer: block.apply({"params": layer}, x, context)[0]
  if config.remat != "none":
    run = jax.checkpoint(run, policy=REMAT_POLICIES[config.remat], prevent_cse=False)

  def layer_and_emit(x, inputs):
    layer, dropped = inputs
    if dropped is None:
      x = run(x, layer)
    elif dropped.ndim:
      x = jnp.where(dropped[:, None, None], x, run(x, layer))
    else:
      x = jax.lax.cond(dropped, lambda x, layer: x, run, x, layer)
    return x, x

  _, hidden = jax.lax.scan(layer_and_emit, x, (params["layers"], dropped))
  return hidden[np.asarray(depths) - 1]
