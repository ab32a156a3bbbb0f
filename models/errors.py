"""The base of every error that a caller of this room can cause."""


class LearningError(ValueError):
    """Data, weights, a backbone, a checkpoint or a training run is not what it has to be.

    The message says what happened, what was expected and what to do next, so a command line can
    print it as it is.
    """
