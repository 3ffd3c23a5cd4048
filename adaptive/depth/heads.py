"""Models with a head after several numbers of layers: the model's own for all, or one of each exit's own."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive.backbone.layers import param
from adaptive.backbone.transformer import Batch, Params, Transformer
from adaptive.config import ModelConfig, require
from adaptive.depth import exits as exiting
from adaptive.depth import objectives

BACKBONE = ("embedding", "layers", "final_norm")  # what a trained dense model brings


class ExitHeads(nn.Module):
  """Declares a norm and a matrix [d, v] for each of several exits, stacked."""

  config: ModelConfig
  number: int

  @nn.compact
  def __call__(self) -> None:
    c = self.config
    param(self, "scale", nn.initializers.ones, (self.number, c.d_model), ("layers", "embed"))
    shape, axes = (self.number, c.d_model, c.vocab_size), ("layers", "embed", "vocab")
    param(self, "matrix", nn.initializers.normal(c.init_std), shape, axes)


class ExitModel(Transformer):
  """The backbone's parameters, and `exit_heads` where exits have their own.

  A method's model is a subclass, whose settings have `exits` (numbers of layers after which a head is trained), `heads`
  (`shared` or `own`) and `exit` (how the trained model leaves).
  """

  method: Any = None

  def setup(self):
    super().setup()
    if self.own_heads:
      self.exit_heads = ExitHeads(self.config, len(self.trained) - 1)

  @property
  def trained(self) -> tuple[int, ...]:
    """Depths with a trained head, the model's own included."""
    return tuple(sorted({*self.method.exits, self.config.num_layers}))

  @property
  def own_heads(self) -> bool:
    return self.method.heads == "own" and len(self.trained) > 1

  @property
  def learned(self) -> Callable[[Params, int], exiting.Signal] | None:
    """(parameters, place of a depth in `trained`) -> the signal that the method trains there; None: it trains none."""
    return None

  @property
  def exits(self) -> exiting.Exits:
    config, how, learned = self.config, self.method.exit, self.learned
    depths = exiting.check(config, how, self.method.exits, learned is not None)
    at_exit = learned and (lambda params, which: learned(params, self.trained.index(depths[which])))
    size = config.d_model * (config.vocab_size + 1) if self.own_heads else 0
    return exiting.Exits(self.clone(parent=None), how, depths, self._own, at_exit, own_params=size)

  def _own(self, params: Params, depth: int) -> Params | None:
    if not self.own_heads or depth == self.config.num_layers:
      return None
    return jax.tree.map(lambda leaf: leaf[self.trained.index(depth)], params["exit_heads"])

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the full model."""
    if self.is_initializing() and self.own_heads:
      self.exit_heads()
    return super().__call__(batch)


def check(model: ExitModel) -> ExitModel:
  """The model; ConfigError for exits that cannot be."""
  exits = model.method.exits
  require(bool(exits), "method.exits is empty: name the numbers of layers after which a token may leave")
  exiting.check(model.config, model.method.exit, exits, model.learned is not None)
  return model


def frozen(params: Params) -> Params:
  """The parameters, to whose backbone no gradient flows."""
  return {name: jax.lax.stop_gradient(part) if name in BACKBONE else part for name, part in params.items()}


def read(model: ExitModel, params: Params, hidden: jax.Array, reader: Callable[[jax.Array], Any]) -> Any:
  """What `reader` makes of the logits [b, t, v] at every trained exit, stacked [e, ...].

  Args:
    hidden: residual stream at those exits, [e, b, t, d].
  """
  shared = lambda _, x: model.apply({"params": params}, x, method="head")
  if not model.own_heads:
    return objectives.read_exits(shared, None, hidden, reader)
  own = lambda head, x: exiting.norm_and_matrix(x, head["scale"], head["matrix"], model.config.norm_eps)
  early = objectives.read_exits(own, params["exit_heads"], hidden[:-1], reader)
  last = objectives.read_exits(shared, None, hidden[-1:], reader)
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), early, last)


def by_depth(model: ExitModel, pairs: Any) -> dict[str, Any]:
  """Losses of the exits (sums and counts [e]) as metrics: `loss` is the model's own, `loss/<depth>` an early exit's."""
  each = [jax.tree.map(lambda x, i=i: x[i], pairs) for i in range(len(model.trained))]
  return {"loss": each[-1], **{f"loss/{depth}": pair for depth, pair in zip(model.trained[:-1], each)}}
