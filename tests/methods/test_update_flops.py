"""FLOPs of an update: against the matrix products in the traced program, by hand, and against XLA's own count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.extend import core

from adaptive import cost as costs
from adaptive.methods import METHODS

LENGTH, ROWS = 8, 12
MODEL = tiny.model_config(num_layers=3)
SIZES = dict(depths=(1, 3), q_per_kv=(1, 3), d_ff=(8, 24), num_sampled=3)
CASES = {
  "dense": ("dense", {}),
  "shared": ("sorted_net", dict(**SIZES, accum_data="shared", executor="static")),
  "split": ("sorted_net", dict(**SIZES, accum_data="split", executor="static")),
  "twice": ("sorted_net", dict(depths=(1, 3), q_per_kv=(1, 3), num_sampled=3, accum_data="shared", executor="static",
                               replacement=True)),
  "distilled": ("sorted_net", dict(**SIZES, accum_data="shared", executor="static", scheme="sandwich", distill=0.5)),
  "multi_exit": ("sorted_net", dict(depths=(1, 2, 3), scheme="multi_exit")),
  "exits": ("early_exit", dict(exits=(1, 2))),
  "distilled_exits": ("early_exit", dict(exits=(1, 2), distill=0.5)),
  "own_exits": ("early_exit", dict(exits=(1, 2), heads="own")),
  "heads_alone": ("early_exit", dict(exits=(1, 2), heads="own", heads_only=True)),
  "classifier": ("early_exit", dict(exits=(1, 2), classifier="joint")),
  "classifier_alone": ("early_exit", dict(exits=(1, 2), heads="own", classifier="alone", distill=0.5)),
  "layer_skip": ("layer_skip", dict(dropout=0.0, curriculum="none")),
  "recursive": ("recursive", dict(num_recursions=3, sharing="cycle")),
  "gates_warm": ("jei_dnn", dict(exits=(1, 2), warmup_steps=4)),
  "gates": ("jei_dnn", dict(exits=(1, 2), warmup_steps=0, phase_steps=4)),
  "gated": ("jei_dnn", dict(exits=(1, 2), warmup_steps=0, phase_steps=2)),
  "gated_frozen": ("jei_dnn", dict(exits=(1, 2), warmup_steps=0, phase_steps=2, heads="own", backbone="frozen")),
  "controller": ("sec", dict(exits=(1, 2))),
  "controller_frozen": ("sec", dict(exits=(1, 2), backbone="frozen")),
  "controller_alone": ("sec", dict(exits=(1, 2), backbone="frozen", heads="shared")),
  "pondernet": ("ponder", dict(num_recursions=3)),
  "act": ("ponder", dict(num_recursions=2, prelude=1, halting="act")),
  "recurrent": ("recurrent_depth", dict(prelude=1, core=1, num_recursions=2, mean_recursions=9.0, backprop=2)),
  "truncated": ("recurrent_depth", dict(prelude=0, core=1, num_recursions=3, mean_recursions=9.0, backprop=1)),
  "fewer": ("recursive", dict(num_recursions=3, sharing="sequence", train_fewer=True)),
  "plans": ("unified_skip", dict(speedups=(1.5,), train="all")),
  "plans_and_cosine": ("unified_skip", dict(speedups=(1.5,), cosine_loss=1.0)),
  "prompts": ("first", dict(prompt_tokens=3)),
  "routers": ("first", dict(prompt_tokens=3, train="routers")),
}  # fmt: skip


def built(name, config=MODEL):
  method, settings = METHODS[CASES[name][0]], CASES[name][1]
  model = method.build(config, method.Config(**settings))
  return method, model, (0, 0, 3) if name == "twice" else method.sample(model, 0, 3)


def products(jaxpr: core.Jaxpr) -> float:
  """FLOPs of all matrix products of a program, the bodies of loops as often as they run."""
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      total += 2.0 * math.prod(shape[axis] for axis in contracted) * math.prod(eqn.outvars[0].aval.shape)
    assert eqn.primitive.name not in ("cond", "while"), "which branch runs, or how often, is not in the program"
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    total += times * sum(products(getattr(inner, "jaxpr", inner)) for inner in subprograms(eqn.params))
  return total


def subprograms(params):
  for value in params.values():
    for leaf in value if isinstance(value, tuple) else (value,):
      if isinstance(leaf, (core.Jaxpr, core.ClosedJaxpr)):
        yield leaf


def gradient(method, model, choice):
  def loss(params, batch):
    return method.loss(model, params, batch, choice, jax.random.key(0), 0)[0]

  return jax.grad(loss), tiny.random_params(model), tiny.one_document(model.config, ROWS, LENGTH)


def test_every_method_is_among_the_cases():
  """Those that route count tokens or visits, not positions: their own tests hold them to a count by hand."""
  routing = {"mixture_of_depths", "mixture_of_recursions", "dr_llm"}
  assert {name for name, _ in CASES.values()} == set(METHODS) - routing


@pytest.mark.parametrize("name", CASES)
def test_the_products_of_a_traced_update_are_those_counted(name):
  method, model, choice = built(name)
  program, params, batch = gradient(method, model, choice)
  # The program computes the whole square of scores: as many keys as positions, which 2 * LENGTH - 1 stands for.
  counted = method.update_flops(model, choice, 2 * LENGTH - 1)
  # Each exit's logits are computed again in the backward pass, which saves memory and is no work of the model's.
  threes = ("multi_exit", "exits", "own_exits", "distilled_exits", "layer_skip", "gates_warm", "gated")
  threes += ("controller", "pondernet", "classifier")
  exits = {**dict.fromkeys(threes, 3), "heads_alone": 2, "gated_frozen": 2, "controller_frozen": 2}.get(name, 0)
  again = costs.head_flops(MODEL) * exits
  found = products(jax.make_jaxpr(program)(params, batch).jaxpr)
  assert found == pytest.approx((counted + again) * ROWS * LENGTH, rel=1e-6)


def by_hand(depth, heads, d_ff, length):
  """Forward FLOPs of one token: d_model 16, heads of size 4, two key/value heads, a tied head of 32 tokens."""
  matrices = 2 * 16 * heads * 4 + 2 * 16 * 2 * 4 + 3 * 16 * d_ff
  return depth * (2 * matrices + 4 * (length + 1) / 2 * heads * 4) + 2 * 32 * 16


def test_updates_by_hand():
  small, large = by_hand(1, 2, 24, 12), by_hand(3, 6, 24, 12)
  flops = {name: built(name)[0].update_flops(*built(name)[1:], 12) for name in ("dense", "twice", "multi_exit")}
  assert flops["dense"] == pytest.approx(3 * large)
  assert flops["twice"] == pytest.approx(3 * (2 * small + large))
  assert flops["multi_exit"] == pytest.approx(3 * (large + 2 * (2 * 32 * 16)))


def test_a_split_batch_costs_the_mean_and_a_shared_one_the_sum():
  flops = {}
  for name in ("split", "shared", "distilled"):
    method, model, _ = built(name)
    flops[name] = method.update_flops(model, (7, 0, 3), 12)
  assert flops["split"] == pytest.approx(flops["shared"] / 3)
  assert flops["distilled"] == flops["shared"]


def test_the_executor_does_not_change_what_has_to_be_computed():
  method, found = METHODS["sorted_net"], set()
  for executor in ("static", "switch", "mask"):
    model = method.build(MODEL, method.Config(**SIZES, executor=executor))
    found.add(method.update_flops(model, (0, 3, 7), 12))
  assert len(found) == 1


def test_numpy_indices_count_as_python_ones():
  method, model, choice = built("shared")
  assert method.update_flops(model, np.asarray(choice), 12) == method.update_flops(model, choice, 12)


def test_xla_counts_the_same_in_an_unrolled_model_without_recomputation():
  config = tiny.model_config(
    vocab_size=512, num_layers=2, d_model=256, d_ff=512, num_heads=4, head_dim=64, scan_unroll=2, tied_embeddings=False
  )
  method, model, choice = built("dense", config)
  program, params, batch = gradient(method, model, jnp.asarray(choice))
  found = jax.jit(program).lower(params, batch).compile().cost_analysis()["flops"]
  counted = method.update_flops(model, choice, 2 * LENGTH - 1) * ROWS * LENGTH
  assert found == pytest.approx(counted, rel=0.03)
