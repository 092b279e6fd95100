"""The command line: ``deepseek-jax COMMAND``."""
