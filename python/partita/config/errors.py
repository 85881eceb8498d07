"""The one exception that a wrong configuration raises."""


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names every key that is wrong and what would be right."""
