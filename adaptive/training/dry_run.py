"""What a run would be, without training it: parameters, sub-models and their costs, mesh, memory."""

import math

import jax
import numpy as np

from adaptive import sharding
from adaptive.data import row_shapes
from adaptive.training import state as states
from adaptive.training.run import Plan, Run
from adaptive.training.step import compile_step

MAX_SUBMODELS = 24


def describe(run: Run) -> str:
  """Text of several tables. Compiles the training step for the run's mesh, allocates nothing on it."""
  parts = [run.dataset.description, _parameters(run), _submodels(run), _mesh(run), _memory(run)]
  return "\n\n".join(parts)


def _parameters(run: Run) -> str:
  params = states.abstract(run.model, run.optimizer, run.mesh).params
  rows = [("parameter", "shape", "values", "sharded over")]
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    rows.append((name, str(list(leaf.shape)), f"{leaf.size:,}", ", ".join(map(str, leaf.sharding.spec)) or "-"))
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  return table(rows) + f"\n{total:,} parameters in {run.experiment.model.param_dtype}"


def _submodels(run: Run) -> str:
  submodels, seq_len = run.method.submodels(run.model), run.experiment.data.seq_len
  costs = [run.method.cost(run.model, s, seq_len, {}) for s in submodels]
  order = sorted(range(len(submodels)), key=lambda i: costs[i].flops_per_token)
  shown = order if len(order) <= MAX_SUBMODELS else order[: MAX_SUBMODELS // 2] + order[-MAX_SUBMODELS // 2 :]
  full = costs[-1].flops_per_token
  rows = [("sub-model", "parameters", "non-embedding", "MFLOP/token", "of full", "KV bytes/token")]
  for i in shown:
    c = costs[i]
    rows.append((
      submodels[i].name, f"{c.params_total:,}", f"{c.params_non_embedding:,}", f"{c.flops_per_token / 1e6:.3f}",
      f"{c.flops_per_token / full:.3f}", f"{c.kv_bytes_per_token:,}",
    ))  # fmt: skip
  left_out = f"\n({len(order) - len(shown)} of {len(order)} in between not shown)" if len(shown) < len(order) else ""
  return table(rows) + left_out


def _mesh(run: Run) -> str:
  data = run.experiment.data
  return (
    f"mesh {dict(run.mesh.shape)} on {run.mesh.size} x {jax.devices()[0].device_kind}; "
    f"{data.batch_size} rows of {data.seq_len} tokens a step, {len(run.dataset.train):,} rows an epoch, "
    f"{run.experiment.training.steps * data.batch_size / len(run.dataset.train):.2f} epochs"
  )


def _memory(run: Run) -> str:
  """What the compiler says that one device needs for a training step."""
  memory = compile_train_step(run).memory_analysis()
  lines = [f"memory of one device: state {state_bytes(run) / 2**20:,.1f} MiB"]
  if memory is not None:
    lines.append(f"activations and other temporaries of a step {memory.temp_size_in_bytes / 2**20:,.1f} MiB")
    lines.append(f"state updated in place {memory.alias_size_in_bytes / 2**20:,.1f} MiB")
  return ", ".join(lines)


def state_bytes(plan: Plan) -> int:
  """Bytes of the train state that lie on one device."""
  state = states.abstract(plan.model, plan.optimizer, plan.mesh)
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))


def compile_train_step(plan: Plan) -> jax.stages.Compiled:
  """The training step of a plan's first choice of sub-models, from shapes alone."""
  e, where = plan.experiment, sharding.batch_sharding(plan.mesh)
  state = states.abstract(plan.model, plan.optimizer, plan.mesh)
  rows = lambda shape: jax.ShapeDtypeStruct((e.data.batch_size, *shape), np.int32, sharding=where)
  batch = {name: rows(shape) for name, shape in row_shapes(e.data, e.model.num_layers).items()}
  choice = plan.method.sample(plan.model, e.seed, 0)
  choice = choice if plan.method.static_choice(plan.model) else np.asarray(choice, np.int32)
  step = compile_step(plan.method, plan.model, plan.optimizer, plan.mesh, e.seed, e.training.grad_accum)
  with jax.set_mesh(plan.mesh):
    return step.lower(state, batch, choice).compile()


def table(rows: list[tuple[str, ...]]) -> str:
  """Rows as lines of aligned columns, the first flush left."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return "\n".join(
    "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]) for row in rows
  )
