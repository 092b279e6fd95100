"""What a request may ask for at most: the engine refuses what passes it, a server what would. No jax here."""

BIASES = 300  # tokens of a logit_bias
ALTERNATIVES = 20
STRINGS, CHARACTERS = 16, 256  # that end an answer, and of each
GRAMMAR = 65_536  # characters of a schema or of a regular expression
RANGES = {
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "alternatives": (0, ALTERNATIVES),
}
