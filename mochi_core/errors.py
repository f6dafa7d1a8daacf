"""The errors a user can meet.

Every message names the value that was given, the rule it breaks and what to do about it.
"""


class MochiError(ValueError):
    """Something the user gave cannot work.

    `value` says what was given, `rule` what is required, `remedy` how to get there.
    """

    def __init__(self, value: str, rule: str, remedy: str):
        self.value, self.rule, self.remedy = value, rule, remedy
        super().__init__(f"{value}: {rule}. {remedy}.")


class ConfigError(MochiError):
    """An architecture whose numbers do not divide."""


class ShapeError(MochiError):
    """A video or latent size that the model cannot make."""


class LatentsError(MochiError):
    """Latents of a wrong shape, or with values that are not numbers."""


class ScheduleError(MochiError):
    """Noise levels or guidance values that no sampler can follow."""


class ConditioningError(MochiError):
    """Text features that do not belong to this model."""


class WeightsError(MochiError):
    """A weight file that is missing, broken, or of another model."""


class LoraError(MochiError):
    """A LoRA that belongs to another model, or to none."""


class KernelError(MochiError):
    """An attention kernel that does not exist or cannot run here."""


class DatasetError(MochiError):
    """Clips or captions that nothing can be learnt from, or a prepared dataset that does not belong to the model."""


class TrainingError(MochiError):
    """A training that cannot begin, go on or be taken up again as asked."""


class MemoryBudgetError(MochiError):
    """A memory budget that is too small for what was asked, whatever is streamed and cut.

    `least` is how many bytes would do, where that is known.
    """

    def __init__(self, value: str, rule: str, remedy: str, least: float = 0):
        super().__init__(value, rule, remedy)
        self.least = least
