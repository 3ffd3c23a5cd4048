"""Experiments to and from ConfigDicts and JSON text, checked field by field; the only reader of ConfigDict.

A config file builds an `ml_collections.ConfigDict` from the defaults (`to_config_dict`), so that a misspelt field fails
where it is written. `from_config_dict` turns it back into the dataclasses of `config.py`.
"""

import ast
import copy
import dataclasses
import json
import types
import typing
from typing import Any, Literal

import ml_collections

from adaptive.config import ConfigError, Experiment, nearest, require

# Fields that may differ between a workdir's saved config and the command that resumes it: none changes what is learned.
_FREE_ON_RESUME = (
  "evaluation", "mesh", "method.exit", "method.thresholds", "method.score_shifts", "method.capacity_scales",
  "method.budgets", "method.when",
  "training.eval_every", "training.checkpoint_every", "training.log_every", "training.keep_checkpoints",
  "training.keep_best", "training.compilation_cache", "training.tensorboard", "training.wandb",
)  # fmt: skip


def to_config_dict(experiment: Experiment, method_name: str) -> ml_collections.ConfigDict:
  """The experiment as a locked ConfigDict, for config files and flags to edit."""
  fields = dataclasses.asdict(experiment)
  fields["method"] = {"name": method_name, **fields["method"]}
  return ml_collections.ConfigDict(fields).lock()


def from_config_dict(config: typing.Mapping[str, Any], method_config: type) -> Experiment:
  """Typed experiment from a ConfigDict (or plain nested dict).

  Args:
    config: as `to_config_dict` returns it; missing fields take their defaults.
    method_config: the `Config` dataclass of the method that `config["method"]["name"]` names.

  Raises:
    ConfigError: unknown field (the nearest known one is named), or a value of the wrong type or range.
  """
  config = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  method = {k: v for k, v in (config.get("method") or {}).items() if k != "name"}
  return _build(Experiment, {**config, "method": _build(method_config, method, "method.")}, "")


def _build(cls: type, values: typing.Mapping[str, Any], prefix: str) -> Any:
  hints = typing.get_type_hints(cls)
  known = [f.name for f in dataclasses.fields(cls)]
  require(hasattr(values, "items"), f"{prefix.rstrip('.') or 'the config'} must have fields, not be {values!r}")
  for name in values:
    if name not in known:
      raise ConfigError(f"unknown config field {prefix}{name}; {nearest(name, known, prefix)}")
  return cls(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
  """Checks a leaf against its annotation; lists become tuples so that the result is hashable."""
  origin = typing.get_origin(hint)
  if dataclasses.is_dataclass(hint):
    return value if isinstance(value, hint) else _build(hint, value, name + ".")
  if hint is Any:
    return value
  if origin is Literal:
    options = typing.get_args(hint)
    require(value in options, f"{name}={value!r} is not one of {', '.join(map(repr, options))}")
    return value
  if origin is tuple:
    require(isinstance(value, (list, tuple)), f"{name}={value!r} must be a tuple")
    return tuple(_convert(typing.get_args(hint)[0], item, name) for item in value)
  if origin in (typing.Union, types.UnionType):
    options = typing.get_args(hint)
    return None if value is None else _convert(next(o for o in options if o is not type(None)), value, name)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  require(
    isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
    f"{name}={value!r} must be of type {hint.__name__}",
  )
  return value


def to_json(experiment: Experiment, method_name: str) -> str:
  """The experiment as JSON text; `from_config_dict(json.loads(text), ...)` gives it back."""
  return json.dumps(to_config_dict(experiment, method_name).to_dict(), indent=2) + "\n"


def differences(
  saved: typing.Mapping[str, Any], wanted: typing.Mapping[str, Any], prefix: str = "", free: tuple[str, ...] = ()
) -> list[str]:
  """Fields of two nested dicts that differ and matter on resume, as `field: saved -> wanted` texts.

  Args:
    free: names of more fields that do not matter.
  """
  found = []
  for key in sorted(set(saved) | set(wanted)):
    name, old, new = prefix + key, saved.get(key), wanted.get(key)
    if name in _FREE_ON_RESUME or name in free:
      continue
    if isinstance(old, dict) and isinstance(new, dict):
      found += differences(old, new, name + ".", free)
    elif json.dumps(old) != json.dumps(new):
      found.append(f"{name}: {old!r} -> {new!r}")
  return found


def changed(saved: dict[str, Any], changes: typing.Sequence[str], free: tuple[str, ...] = ()) -> dict[str, Any]:
  """A saved config with some fields replaced that no training depends on.

  Args:
    changes: `field=value` texts; a value is a Python literal, or else a word.
    free: more fields on which no training depends.

  Raises:
    ConfigError: not of that form, no such field, or one that was trained with.
  """
  wanted = copy.deepcopy(saved)
  for change in changes:
    name, equals, text = change.partition("=")
    require(bool(equals), f"--set={change!r} is not of the form field=value")
    *parents, last = name.split(".")
    place = wanted
    for part in parents:
      place = place.get(part) if isinstance(place, dict) else None
    known = list(place) if isinstance(place, dict) else []
    require(last in known, f"--set: unknown config field {name}" + (f"; {nearest(last, known)}" if known else ""))
    try:
      place[last] = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
      place[last] = text
    plain = (str, int, float, bool, type(None), tuple, list)
    require(isinstance(place[last], plain), f"--set: {name}={text} is neither a number, nor a word, nor a tuple")
    fixed = differences(saved, wanted, free=free)
    require(not fixed, f"--set: {name} is part of what was trained")
  return wanted
