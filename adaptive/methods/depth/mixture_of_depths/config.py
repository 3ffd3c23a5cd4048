"""Settings of Mixture-of-Depths, and what cannot be."""

import dataclasses
from typing import Literal

import jax

from adaptive import routing
from adaptive.config import ModelConfig, require, require_range


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of Mixture-of-Depths.

  Attributes:
    every: of so many layers the last is routed: 2 routes every other layer, the second first, and 1 all of them.
    routed: instead, the indices of the layers that are routed, from 0.
    capacity: share of the whole row that a routed layer takes in training. With 1 all tokens pass, at inference too.
    capacity_chunk: tokens are taken within pieces of so many tokens; bounds how far training looks ahead. 0: in the
      whole row.
    capacity_multiple: rounds the number of tokens to a multiple of this, such as 128.
    gate: function of the router's score by which what a layer adds to a token is multiplied; `score` is the score
      itself, as in the paper. `none`: by nothing, an ablation: the router then learns from its own loss alone.
    inference: what decides at inference, where top-k would look ahead: the `router` itself, which then learns to tell
      whether it will choose a token (the paper's auxiliary loss), or a `predictor`, which learns that apart from the
      model, from features without gradient.
    router_loss: weight of the router's cross entropy, summed over the routed layers.
    score_shifts, capacity_scales: sub-models beside the full one, at inference: so much added to the scores that
      decide, so that more tokens pass, or fewer; no more than scale x capacity of a document's tokens so far.
  """

  every: int = 2
  routed: tuple[int, ...] = ()
  capacity: float = 0.125
  capacity_chunk: int = 0
  capacity_multiple: int = 1
  gate: Literal["score", "sigmoid", "tanh", "none"] = "score"
  inference: Literal["router", "predictor"] = "router"
  router_loss: float = 0.01
  score_shifts: tuple[float, ...] = ()
  capacity_scales: tuple[float, ...] = ()

  def __post_init__(self):
    require_range(self, "method.", "every capacity_multiple", 1)
    require_range(self, "method.", "capacity_chunk router_loss", 0)
    require_range(self, "method.", "capacity", 0, 1, above=True)
    require(
      self.gate != "none" or (self.inference == "router" and self.router_loss > 0),
      "method.gate='none' needs method.inference='router' and a method.router_loss: nothing else trains the routers",
    )
    routing.check_dials(self.score_shifts, self.capacity_scales)

  def layers(self, model: ModelConfig) -> tuple[int, ...]:
    """Indices of the routed layers; ConfigError where there are none, or not all of those listed."""
    full = model.num_layers
    require(
      list(self.routed) == sorted(set(self.routed)) and all(0 <= layer < full for layer in self.routed),
      f"method.routed={self.routed} must increase and lie in 0..{full - 1}",
    )
    found = self.routed or tuple(range(self.every - 1, full, self.every))
    require(bool(found), f"method.every={self.every} routes none of the model.num_layers={full} layers")
    return found

  def tokens(self, seq_len: int) -> int:
    """Of a row, that a routed layer takes in training; ConfigError where the row does not divide into chunks."""
    return routing.capacity_tokens(self.capacity, seq_len, self.capacity_chunk, self.capacity_multiple)

  def chunks(self, seq_len: int) -> int:
    """Pieces of a row."""
    return seq_len // self.capacity_chunk if self.capacity_chunk else 1

  def bound(self, scale: float | jax.Array) -> float | jax.Array:
    """Share of a document's tokens that may pass. A layer that takes all tokens is never bounded."""
    return 1.0 if self.capacity == 1 else scale * self.capacity

  @property
  def decision_loss(self) -> float:
    """Weight of the cross entropy of whoever decides at inference."""
    if self.capacity == 1:
      return 0.0  # nothing to learn
    return self.router_loss if self.inference == "router" else 1.0  # nothing else trains a predictor, and it nothing
