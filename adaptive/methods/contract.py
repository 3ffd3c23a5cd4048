"""What the rest of the framework asks of a method, and the types that pass between them.

A method is a module of functions (no base class), listed in `adaptive.methods.METHODS`. Its model is a Linen module
that carries both configs, so every function takes just the model.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive.config import Experiment, ModelConfig, require
from adaptive.cost import Cost
from adaptive.depth.ladder import Ladder
from adaptive.losses import SumCount

Params = Any
Cache = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, SumCount]
Rule = TypeVar("Rule", bound=tuple)


@dataclasses.dataclass(frozen=True)
class SubModel:
  """One setting of a method's dial, such as depth=6, d_ff=384; hashable, and the unit of evaluation."""

  dial: tuple[tuple[str, int | float | str], ...]

  @classmethod
  def of(cls, **dial: int | float | str) -> "SubModel":
    return cls(tuple(dial.items()))

  @property
  def name(self) -> str:
    return ",".join(f"{key}={value}" for key, value in self.dial)

  def __getitem__(self, key: str) -> int | float | str:
    return dict(self.dial)[key]


class Output(NamedTuple):
  """Result of a forward pass.

  Attributes:
    logits: float32 [b, t, v].
    aux: realised quantities (layers run, tokens kept) as (sum, count) pairs; empty when nothing depends on the input.
  """

  logits: jax.Array
  aux: Metrics


class Decoder(NamedTuple):
  """One sub-model as generation runs it: with a cache, a few tokens at a time.

  Attributes:
    params: of the sub-model alone, for `step`.
    empty_cache: (batch_size, slots) -> a cache with room for `slots` tokens in each row. It knows how many it holds.
    step: (params, tokens int32 [b, t], counts int32 [b], cache) -> (logits float32 [b, v], cache, realised quantities
      as in `Output.aux`). The first counts[row] of a row's tokens are real and follow those that the cache holds, the
      others are padding. The logits are those of the token after a row's last real one. A row with count 0 stays as it
      is, takes part in no realised quantity, and its logits mean nothing.
    cycle: after so many tokens, at most, the work that steps put off is done: who times steps takes whole cycles.
  """

  params: Params
  empty_cache: Callable[[int, int], Cache]
  step: Callable[[Params, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache, Metrics]]
  cycle: int = 1


class Ticker(NamedTuple):
  """One sub-model as depth-wise batching runs it: requests in slots, each token at its own depth.

  Attributes:
    params: of the sub-model, for the other functions, all of which are traced.
    empty: (slots, room) -> a state of idle slots, each with room for so many tokens.
    advance: (params, state) -> state: the next pass of each slot under way.
    under_way: state -> bool [b]: whose token takes a pass next. ready: state -> bool [b]: whose wants no more.
    lengths: state -> int32 [b]: tokens of each slot, the one under way included.
    finish: (params, state) -> (logits [b, v] of the next token of each slot that is ready, state).
    feed: (params, state, tokens [b], valid bool [b]) -> state: begins those tokens.
    leave: (state, valid bool [b]) -> state: slots that become idle.
    prefill: (params, state, chosen [c], tokens [c, t], counts [c]) -> (logits [c, v], state): new requests; 0 is none.
  """

  params: Params
  empty: Callable[[int, int], Any]
  advance: Callable[[Params, Any], Any]
  under_way: Callable[[Any], jax.Array]
  ready: Callable[[Any], jax.Array]
  lengths: Callable[[Any], jax.Array]
  finish: Callable[[Params, Any], tuple[jax.Array, Any]]
  feed: Callable[[Params, Any, jax.Array, jax.Array], Any]
  leave: Callable[[Any, jax.Array], Any]
  prefill: Callable[[Params, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def check_index(index: int | jax.Array, number: int) -> None:
  """Raises IndexError for an int that is no position in a list of `number` sub-models, a negative one included.

  A traced index has no value to check yet: JAX clamps one that is too large to the last sub-model, and counts a
  negative one from the end. Who makes traced indices takes them from `Method.sample` or from a range.
  """
  if isinstance(index, int) and not 0 <= index < number:
    raise IndexError(f"there is no sub-model {index}: they are numbered 0 to {number - 1}")


def drafts_of(submodels: Sequence[SubModel], drafts: Sequence[SubModel] | None) -> Sequence[SubModel]:
  """Those that are to draft for the last, the full model: all others unless named; ConfigError for itself."""
  full = submodels[-1]
  require(drafts is None or full not in drafts, f"{full.name} is the full model: it cannot draft for itself")
  return submodels[:-1] if drafts is None else drafts


def pick(rules: Sequence[Rule], index: int | jax.Array) -> Rule:
  """The rule at an index of a list of named tuples of numbers; for a traced index one of traced numbers.

  A number that all have in common stays one, and is not looked for in the program. IndexError as in `check_index`.
  """
  check_index(index, len(rules))
  if isinstance(index, int):
    return rules[index]
  columns = [np.array(column) for column in zip(*rules)]
  same = lambda column: len(set(column.tolist())) == 1
  return type(rules[0])(*(c[0].item() if same(c) else jnp.asarray(c)[index] for c in columns))


class Method(Protocol):
  """The functions of a method's module."""

  Config: type
  """Frozen dataclass of the method's own fields."""

  def build(self, model_config: ModelConfig, config: Any) -> nn.Module:
    """The model; called on a batch it computes the full model's logits. ConfigError for settings that cannot be."""

  def check_training(self, model: nn.Module, experiment: Experiment) -> None:
    """ConfigError for settings of training and data with which the method's own cannot train what they say."""

  def submodels(self, model: nn.Module) -> tuple[SubModel, ...]:
    """All sub-models that the method trains, the full model last. An index below is a position in this list."""

  def sample(self, model: nn.Module, seed: int, step: int) -> tuple[int, ...]:
    """Indices of the sub-models of one step: a pure function of (seed, step), so all hosts and resumed runs agree.

    A method that trains in stages, each compiled by itself, may choose numbers of stages where `static_choice`.
    """

  def static_choice(self, model: nn.Module) -> bool:
    """Whether `loss` needs the indices at trace time (one compile per choice) or takes them traced (one for all)."""

  def batch_parts(self, model: nn.Module) -> int:
    """Into how many equal pieces `loss` cuts the rows of a batch; 1 when it does not."""

  def loss(
    self, model: nn.Module, params: Params, batch: Batch, choice: Any, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    """Training loss of the sampled sub-models on a batch, and metrics.

    `metrics["loss"]` is the task loss whose count weighs this micro-batch against others. A metric whose arrays have
    shape [len(choice)] is one value for each sub-model of the choice.
    """

  def control(self, model: nn.Module, params: Params, metrics: Metrics) -> Params:
    """Parameters after an update, changed where a controller decides and no gradient; for most methods, as they are.

    What a controller remembers is a parameter to which no gradient flows, so it is saved, sharded and evaluated as all
    others are. `metrics` are those of the whole update.
    """

  def learning_rates(self, model: nn.Module) -> Mapping[str, float]:
    """Factors of the learning rate by top-level name of the parameters; 1 where it says nothing, 0 is frozen.

    Parameters of one factor are clipped together, by themselves.
    """

  def init_from(self, model: nn.Module, params: Params, source: Params, how: str, seed: int) -> Params:
    """Fresh parameters with those of a trained dense model of the same `ModelConfig` put in (`training.init_from`).

    `how` is `training.init_layers`, for methods whose layers are not the model's own.
    """

  def forward(self, model: nn.Module, params: Params, batch: Batch, index: int | jax.Array) -> Output:
    """The sub-model's causal forward pass: cut out at trace time for an int, one program for all for a traced index.

    IndexError for an int out of range (`check_index`). A traced index out of range is clamped by JAX, not noticed.
    """

  def at_random(self, model: nn.Module, realised: Sequence[Metrics]) -> tuple[nn.Module, Sequence[int | None]] | None:
    """A baseline: sub-models that decide by chance, at the rates measured of those that decide by what they see.

    Args:
      realised: of every sub-model, what `Output.aux` measured.

    Returns:
      A model for the same parameters, and for every sub-model the index in it of its counterpart, None where nothing is
      decided; or None where nothing is in all of them.
    """

  def diagnose(self, model: nn.Module, params: Params, batches: Sequence[Batch], mesh: Mesh) -> Mapping[str, float]:
    """What an evaluation should tell of the full model beside its loss, by name, on held-out batches; often nothing."""

  def cost(self, model: nn.Module, submodel: SubModel, seq_len: int, realised: Metrics) -> Cost:
    """Analytic cost of a sub-model on sequences of seq_len tokens, given what `Output.aux` measured."""

  def update_flops(self, model: nn.Module, choice: tuple[int, ...], seq_len: int) -> float:
    """Analytic FLOPs of one update, forward and backward, per token of the whole batch (padding included).

    Counts what the sampled sub-models have to compute, whichever executor runs them: no recomputation, and nothing
    that a mask throws away. Rows are `seq_len` tokens; attention is counted as in `cost`.
    """

  def extract(self, model: nn.Module, params: Params, submodel: SubModel) -> tuple[ModelConfig, Params] | None:
    """The sub-model as an ordinary dense model for `Transformer`; None where there is no such thing."""

  def decoder(self, model: nn.Module, params: Params, submodel: SubModel) -> Decoder:
    """The sub-model for generation: token by token it gives the logits of `forward`."""

  def ladder(self, model: nn.Module, params: Params, drafts: Sequence[SubModel] | None) -> Ladder | None:
    """The full model with sub-models that can draft for it, for self-speculative decoding; None where none can.

    All that can are meant by None. ConfigError for one that cannot.
    """

  def ticker(self, model: nn.Module, params: Params, submodel: SubModel) -> Ticker | None:
    """The sub-model for depth-wise batching; None where every token takes the same path."""
