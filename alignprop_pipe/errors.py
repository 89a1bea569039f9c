"""Every error that a user can meet: what came, what was needed, and the way out."""

import typing


class AlignError(Exception):
    """Base of all errors raised on purpose by this package.

    `result` is the AlignResult, with the adapter in it, of a run that had learned something when it failed; else None.

    Examples:
        >>> from alignprop_pipe import AlignError, PromptSet
        >>> try:
        ...     PromptSet.load([])
        ... except AlignError as error:
        ...     print(str(error).partition(";")[0])
        there are no prompts
    """

    result: typing.Any = None


class ConfigError(AlignError, ValueError):
    """A setting has a value that is not allowed, or a name that does not exist."""


class PromptError(AlignError, ValueError):
    """No prompts, an unreadable prompt file, or a column that is missing."""


class PipelineError(AlignError):
    """The pipeline cannot be aligned as it stands: a part is missing, quantised or offloaded."""


class RewardError(AlignError):
    """A reward cannot be found, read, or used for training."""


class RewardShapeError(RewardError):
    """A reward returned something else than one score per image."""


class RewardGradientError(RewardError):
    """A reward lost the gradient between its images and its scores."""


class RewardValueError(RewardError):
    """A reward returned NaN or infinity."""


class AdapterError(AlignError):
    """An adapter file is missing, damaged, or made for another model."""


class HubError(AdapterError):
    """An adapter cannot be pushed to the Hugging Face Hub, or loaded from there."""


class TrainingDiverged(AlignError):
    """Losses, gradients, weights or evidence were no finite numbers any more."""


class RunError(AlignError):
    """A run folder cannot be created, read or written."""
