"""Dr.LLM: a router at each layer reads the prompt and says how often the layer runs: not at all, once, or twice.

Heakl et al., "Dr.LLM: Dynamic Layer Routing in LLMs" (arXiv 2510.12773). The model is a trained one and stays as it is.
A search (`search.py`, `adaptive.search`) finds, for each question, layers whose path answers it at least as well, and
routers learn to tell them from the prompt: Sections 3.1 to 3.3 are `router`, `adaptive.search` and `objective` here.

Departures, with reasons:
- decided once, from the prompt, and kept while tokens follow, as the paper has it; `when="per_step"` decides again at
  every token, as the released code does;
- `split="even"` has every token of the prompt in a window; the `paper`'s leaves out up to 7 of the newest, where a
  question ends;
- `start="execute"`: fresh routers execute every layer, so that training begins at the given model, exactly. `xavier` is
  the paper's;
- beta of the class weights is a setting: the paper's 0.999 hardly tells classes of 1,457 and 120,956 labels apart;
- rows decide each for themselves; the released code applies the first row's decisions to all;
- questions that a plan mends are not weighed against those that only get shorter plans (the paper keeps 30 % of the
  former); of a question that no plan answers the label is to execute everything.

A prompt decides for all its tokens, so what is predicted inside of it depends on all of it. Nobody reads that: losses,
scores and continuations begin with the prompt's last token. Text in which no prompt is marked runs the given model.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive import losses
from adaptive.backbone import decoding
from adaptive.backbone.transformer import Transformer
from adaptive.config import Experiment, ModelConfig, require, require_range, require_trained
from adaptive.depth import chance
from adaptive.methods.contract import Batch, Decoder, Metrics, Output, Params, SubModel, check_index
from adaptive.methods.defaults import (
  batch_parts,
  control,
  diagnose,
  init_from,
  ladder,
  static_choice,
  ticker,
)
from adaptive.methods.depth.dr_llm import objective, router, running

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip

_NO_LABELS = "method dr_llm learns from labels of a search: set data.source='questions' and data.labels"
_EXECUTE = 0.5  # the budget at which every layer is executed, whatever its router says


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of Dr.LLM.

  Attributes:
    hidden: units between a router's two linear layers. windows: of a prompt, at most.
    split: how a prompt is cut into windows (see `router.windows`). start: of fresh routers.
    budgets: each is a sub-model: positions of the dial from all-skip (-1) over the routers' own decisions (-0.5) and
      execute (0.5) to all-repeat (1); increasing.
    when: decisions are made `once`, by the prompt, or also `per_step`, by every later token for itself.
    teacher_forcing: training runs the labels' paths, so that a router sees what the layers before it leave when they
      decide rightly; otherwise its own.
    gamma: exponent of the focal loss. beta: of the effective numbers that weigh its classes; 0 weighs them alike.
  """

  hidden: int = 128
  windows: int = 8
  split: router.Split = "even"
  start: router.Start = "execute"
  budgets: tuple[float, ...] = (-0.6, -0.5, -0.4, -0.2)
  when: Literal["once", "per_step"] = "once"
  teacher_forcing: bool = True
  gamma: float = 2.0
  beta: float = 0.999

  def __post_init__(self):
    require_range(self, "method.", "hidden windows", 1)
    require_range(self, "method.", "gamma", 0)
    require_range(self, "method.", "beta", 0, 1)
    require(self.beta < 1, "method.beta=1.0 must be below 1")
    increasing = list(self.budgets) == sorted(set(self.budgets))
    require(
      increasing and all(-1 <= budget <= 1 for budget in self.budgets),
      f"method.budgets={self.budgets} must be increasing and lie in -1 .. 1",
    )


class DrLLM(Transformer):
  """The backbone's parameters, and `routers` of all layers.

  Attributes:
    chance: of a baseline: for every sub-model and layer the shares of the prompts that skip and repeat it, whichever
      they are.
  """

  method: Config = Config()
  chance: tuple[tuple[tuple[float, float], ...], ...] = ()

  def setup(self):
    super().setup()
    self.routers = router.Routers(self.config, self.method.hidden, self.method.start)

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the given model, which executes every layer."""
    if self.is_initializing():
      self.routers()
    return super().__call__(batch)


def build(model_config: ModelConfig, config: Config) -> DrLLM:
  return DrLLM(model_config, method=config)


def check_training(model: DrLLM, experiment: Experiment) -> None:
  require_trained(experiment.training, "method dr_llm")
  data = experiment.data
  require(data.source == "questions" and bool(data.labels), _NO_LABELS)


def submodels(model: DrLLM) -> tuple[SubModel, ...]:
  """A budget each; the full model, which asks no router, last."""
  dials = [SubModel.of(budget=budget) for budget in model.method.budgets]
  return (*dials, SubModel.of(depth=model.config.num_layers))


def sample(model: DrLLM, seed: int, step: int) -> tuple[int, ...]:
  """One loss trains all budgets: the choice is always the full model."""
  return (len(submodels(model)) - 1,)


def backbone(params: Params) -> Params:
  """All but the routers."""
  return {name: part for name, part in params.items() if name != "routers"}


def _decisions(model: DrLLM, weights: tuple[float, ...] | jax.Array) -> running.Decisions:
  method = model.method
  cut = lambda prompt: router.windows(prompt, method.windows, method.split)
  return running.Decisions(cut, weights, method.when == "per_step")


def loss(model: DrLLM, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Focal loss of every layer's router on the labels of each row's prompt."""
  require("visits" in batch, _NO_LABELS)
  method, labels = model.method, batch["visits"].T  # [l, b]
  prompt, frozen = losses.prompt(batch), jax.lax.stop_gradient(backbone(params))
  cut = router.windows(prompt, method.windows, method.split)
  logits = _training_logits(model, {**frozen, "routers": params["routers"]}, batch, cut, labels)
  mask = jnp.broadcast_to(jnp.any(prompt, axis=1)[None], labels.shape)
  weights = objective.class_weights(batch["label_counts"][0], method.beta)
  each = objective.focal(logits, labels, weights, method.gamma)
  pair = losses.masked_sum(each, mask)
  return losses.mean(pair), {"loss": pair, **objective.metrics(logits, labels, mask)}


def _training_logits(model: DrLLM, params: Params, batch: Batch, cut: router.Windows, labels: jax.Array) -> jax.Array:
  """Each router's logits along the path that training runs, [l, b, 3]; no gradient but the router's own."""
  method, rows = model.method, batch["inputs"].shape

  def decide(which: jax.Array, x: jax.Array, own: Params) -> tuple[jax.Array, jax.Array]:
    logits = router.prompt_logits(own, jax.lax.stop_gradient(x), cut)
    path = labels[which] if method.teacher_forcing else jnp.argmax(jax.lax.stop_gradient(logits), axis=-1)
    return jnp.broadcast_to(path[:, None], rows), logits

  return running.along(model.config, params, batch, decide)


def learning_rates(model: DrLLM) -> dict[str, float]:
  """The given model stays as it is."""
  return dict.fromkeys(("embedding", "layers", "final_norm"), 0.0)


def forward(model: DrLLM, params: Params, batch: Batch, index: int | jax.Array) -> Output:
  """Logits at a budget; the given model's where the index is its number, and of rows without a marked prompt."""
  budgets = (*model.method.budgets, _EXECUTE)
  check_index(index, len(budgets))
  prompt, real = losses.prompt(batch), batch["segment_ids"] > 0
  if prompt is None or (isinstance(index, int) and index == len(budgets) - 1):
    logits = Transformer(model.config).apply({"params": backbone(params)}, batch)
    if isinstance(index, int) and index == len(budgets) - 1:
      return Output(logits, {})
    everything = jnp.ones((model.config.num_layers, *real.shape), jnp.int32)
    return Output(logits, running.realised(everything, real))
  weights = jnp.asarray(np.array([router.dial(budget) for budget in budgets], np.float32))[index]
  choose = running.chooser(_decisions(model, weights), prompt)
  if model.chance:
    choose = _by_chance(model, params, batch, prompt, index)
  logits, rows = running.one_shot(model.config, params, batch, choose)
  return Output(logits, running.realised(rows, real))


def _by_chance(model: DrLLM, params: Params, batch: Batch, prompt: jax.Array, index: int | jax.Array) -> Callable:
  """Each prompt by noise of its tokens, at each layer's rates of skips and repeats."""
  rates = jnp.asarray(model.chance, jnp.float32)[index]
  x, _ = Transformer(model.config).apply({"params": backbone(params)}, batch, method="embed")
  documents = chance.of_prompts(chance.places(x, batch["positions"]), prompt)

  def choose(which: jax.Array, x: jax.Array, own: Params) -> jax.Array:
    noise = chance.noise(documents, which)
    skip, repeat = rates[which]
    rows = jnp.where(noise < skip, 0, jnp.where(noise >= 1 - repeat, 2, 1))
    return jnp.broadcast_to(rows[:, None], prompt.shape)

  return choose


def at_random(model: DrLLM, realised: Sequence[Metrics]) -> tuple[DrLLM, Sequence[int | None]] | None:
  """As many prompts skip and repeat each layer, whichever they are."""
  measured = [one for one in realised[:-1] if one]
  if len(measured) < len(realised) - 1 or not measured:
    return None
  layers = range(model.config.num_layers)
  rates = [
    tuple((chance.share(one[f"skipped/{layer}"]), chance.share(one[f"repeated/{layer}"])) for layer in layers)
    for one in measured
  ]
  rates.append(((0.0, 0.0),) * len(layers))
  return model.clone(chance=tuple(rates)), [*range(len(measured)), None]


def router_flops(model: DrLLM, seq_len: int) -> float:
  """Forward FLOPs of all routers for one token of a prompt of `seq_len` tokens: windows, and their means.

  Where every later token decides again, for one of those, which asks each router once.
  """
  windows, width = min(model.method.windows, seq_len), model.config.d_model
  asked = router.router_flops(width, model.method.hidden)
  each = asked if model.method.when == "per_step" else windows * (asked / seq_len + 2.0 * width)
  return model.config.num_layers * each


def cost(model: DrLLM, submodel: SubModel, seq_len: int, realised: Metrics) -> costs.Cost:
  """From the shares of the tokens that skipped and repeated each layer; without them as if none did."""
  config = model.config
  dense = costs.with_params(costs.dense_cost(config, seq_len), router.router_params(config, model.method.hidden))
  if submodel == submodels(model)[-1]:  # asks no router
    return dense
  layers, number = realised["layers"] if realised else (float(config.num_layers), 1.0)
  run = float(layers) / float(number)
  flops = run * costs.layer_flops(config, (seq_len + 1) / 2) + router_flops(model, seq_len) + costs.head_flops(config)
  written = round(dense.kv_bytes_per_token * run / config.num_layers)
  return dataclasses.replace(dense, flops_per_token=flops, kv_bytes_per_token=written)


def update_flops(model: DrLLM, choice: tuple[int, ...], seq_len: int) -> float:
  """The layers once, forward, without the head; routers forward and backward."""
  layers = model.config.num_layers * costs.layer_flops(model.config, (seq_len + 1) / 2)
  return layers + costs.update_flops(router_flops(model, seq_len))


def extract(model: DrLLM, params: Params, submodel: SubModel) -> tuple[ModelConfig, Params] | None:
  """The given model; None for budgets, where each prompt has layers of its own."""
  return (model.config, backbone(params)) if submodel == submodels(model)[-1] else None


def decoder(model: DrLLM, params: Params, submodel: SubModel) -> Decoder:
  """The tokens of a row's first step are its prompt; layers that no row of the batch runs are left out."""
  found = extract(model, params, submodel)
  if found is not None:
    return Decoder(*decoding.dense(*found))
  return Decoder(*running.decoder(model.config, params, _decisions(model, router.dial(submodel["budget"]))))
