"""What `eval.py --extract` does: a sub-model by itself, as a dense run or as a Hugging Face folder."""

import dataclasses
import json
import pathlib

import flax.linen as nn
import jax

from adaptive import config_dict, sharding
from adaptive.backbone.transformer import Params
from adaptive.config import Experiment, require
from adaptive.data.tokenizers import make_tokenizer
from adaptive.methods import METHODS
from adaptive.pretrained import export
from adaptive.pretrained.published import Published, is_published
from adaptive.training.checkpoint import Checkpointer
from adaptive.training.run import CHECKPOINTS, Plan, find_submodel, load_params, load_plan
from adaptive.training.workdir import open_workdir, user_errors


def extract(workdir: str, step: int | None, name: str, output: str | None, hugging_face: bool = False) -> None:
  """Writes a sub-model as a workdir of its own, which holds an ordinary dense model.

  Args:
    hugging_face: as a Hugging Face folder instead.

  Raises:
    ConfigError: no such sub-model, it cannot stand alone, or the folder is taken.
  """
  require(output is not None, "--extract needs --output, the folder of the new run")
  plan = load_plan(workdir)
  submodel = find_submodel(plan, name)
  step, params = load_params(plan, workdir, step)
  found = plan.method.extract(plan.model, params, submodel)
  require(found is not None, f"sub-model {name} needs its method to run: it cannot be extracted")
  model_config, small = found
  dense = dataclasses.replace(plan.experiment, model=model_config, method=METHODS["dense"].Config())
  if hugging_face:
    _write_hugging_face(workdir, dense, small, output)
    print(f"wrote {name} to {output}; try: python generate.py --model={output} --prompt='...'")
  else:
    _write_run(plan, name, step, dense, small, output)
    print(f"wrote {name} to {output}; evaluate it with: python eval.py --workdir={output}")


def _write_run(plan: Plan, name: str, step: int, dense: Experiment, params: Params, output: str) -> None:
  folder = open_workdir(output, config_dict.to_json(dense, "dense"))
  origin = {"submodel": name, "method": plan.method_name, "config": json.loads(plan.config_json)}
  with Checkpointer(folder / CHECKPOINTS, keep=1) as checkpointer:
    # Saving a step that is there already does nothing, and an older step would not be the newest.
    require(not checkpointer.steps(), f"{output} holds an extracted model already; choose another --output")
    params = jax.device_put(params, sharding.replicated(plan.mesh))
    checkpointer.save(step, {"params": params}, {"step": step, "extracted_from": origin})


def _write_hugging_face(workdir: str, dense: Experiment, params: Params, output: str) -> None:
  require(jax.process_count() == 1, "a Hugging Face folder is written by one process")
  folder, source = pathlib.Path(output), Published(pathlib.Path(workdir)) if is_published(workdir) else None
  with user_errors(f"cannot write {output}"):
    folder.mkdir(parents=True, exist_ok=True)
    require(not any(folder.iterdir()), f"{output} is not empty; choose another --output")
    export.write(
      folder,
      dense.model,
      nn.unbox(params),
      dataclasses.replace(dense.data, seq_len=source.max_len or dense.data.seq_len) if source else dense.data,
      make_tokenizer(dense.data),
      begins=source is None and dense.data.prefix == "bos",
      stop_tokens=source.stop_tokens if source else (),
      chat_template=source and source.chat_template,
    )
