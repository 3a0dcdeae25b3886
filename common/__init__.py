"""What every generative policy needs and no paper is about: files, folders, simulators, numerical integration."""


class UserError(Exception):
    """A mistake in the input, told in one sentence: what is wrong, where, what to do. A command exits with code 2."""


class TrainingError(Exception):
    """Training cannot go on (a loss is NaN, say), told in one sentence. A command exits with code 1."""


class Interrupted(Exception):
    """The run was told to stop, and has saved. Its arguments: the number of the signal, a sentence."""
