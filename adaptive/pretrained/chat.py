"""A user's message as the model was trained on them: rendered by the Jinja template that its files carry."""

from adaptive.config import ConfigError


def render(template: str, message: str, special: dict[str, str]) -> str:
  """The text of a conversation of one message, up to where the model answers.

  Args:
    special: what templates may ask for by name, such as `bos_token`.

  Raises:
    ConfigError: jinja2 is not installed, or the template fails.
  """
  try:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError as error:
    raise ConfigError("chat templates need the jinja2 package: pip install 'adaptive[pretrained]'") from error

  def refuse(reason: str) -> None:
    raise TemplateError(reason)

  environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  environment.globals["raise_exception"] = refuse
  messages = [{"role": "user", "content": message}]
  try:
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
  except TemplateError as error:
    raise ConfigError(f"the model's chat template fails: {error}") from error
