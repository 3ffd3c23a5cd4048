"""The table of methods. Each is a module of the functions that `adaptive.methods.contract.Method` lists.

To add one: its file, a row here, its config file, its test, its page. Nothing else should need to change.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from adaptive import config as configs
from adaptive import config_dict
from adaptive.methods import dense
from adaptive.methods.contract import Method
from adaptive.methods.depth import (
  dr_llm,
  early_exit,
  first,
  jei_dnn,
  layer_skip,
  mixture_of_depths,
  mixture_of_recursions,
  ponder,
  recurrent_depth,
  recursive,
  sec,
  unified_skip,
)
from adaptive.methods.width import sorted_net

METHODS: dict[str, Method] = {
  "dense": dense,
  "dr_llm": dr_llm,
  "early_exit": early_exit,
  "first": first,
  "jei_dnn": jei_dnn,
  "layer_skip": layer_skip,
  "mixture_of_depths": mixture_of_depths,
  "mixture_of_recursions": mixture_of_recursions,
  "ponder": ponder,
  "recurrent_depth": recurrent_depth,
  "recursive": recursive,
  "sec": sec,
  "sorted_net": sorted_net,
  "unified_skip": unified_skip,
}


def find(name: str) -> Method:
  """The method of that name; ConfigError when there is none."""
  configs.require(name in METHODS, f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
  return METHODS[name]


def default_config(name: str) -> ml_collections.ConfigDict:
  """Every setting of a run of this method at its default, locked against unknown fields: what a config file edits."""
  return config_dict.to_config_dict(configs.Experiment(method=find(name).Config()), name)


def parse_config(config: Mapping[str, Any]) -> tuple[Method, configs.Experiment]:
  """The method and the typed experiment of a ConfigDict or of a saved config's JSON."""
  configs.require("name" in (config.get("method") or {}), "the config names no method: method.name is missing")
  method = find(config["method"]["name"])
  return method, config_dict.from_config_dict(config, method.Config)
