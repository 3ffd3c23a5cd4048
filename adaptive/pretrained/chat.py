"""A conversation as the model was trained on them: rendered by the Jinja template that its files carry."""

from collections.abc import Mapping, Sequence

from adaptive.config import ConfigError


def render(template: str, messages: Sequence[Mapping[str, str]], special: dict[str, str], begin: bool = True) -> str:
  """The text of a conversation.

  Args:
    messages: with a `role` and a `content` each. special: what templates may ask for by name, such as `bos_token`.
    begin: whether it goes up to where the model answers, and not only to the end of the last message.

  Raises:
    ConfigError: jinja2 is not installed, or the template fails.
  """
  try:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError as error:
    raise ConfigError("chat templates need the jinja2 package: pip install -e '.[pretrained]'") from error

  def refuse(reason: str) -> None:
    raise TemplateError(reason)

  environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  environment.globals["raise_exception"] = refuse
  try:
    return environment.from_string(template).render(messages=list(messages), add_generation_prompt=begin, **special)
  except TemplateError as error:
    raise ConfigError(f"the model's chat template fails: {error}") from error
