"""The exceptions that glmq raises for its user, and the exit code of each.

    GlmqError                  1   something failed that is not listed below
    ├── LostRanksError             another rank of torchrun is gone or does not answer
    ├── OtherRankError             another rank stopped; the sentence is its
    ├── UsageError             2   options contradict each other, or a value is out of range
    ├── InputError             4   what was given to work on is wrong
    │   ├── CheckpointError        a weight file, its header, index or description
    │   ├── ModelError             a config.json that is not a GLM-4.1V, or a layout we do not know
    │   ├── SampleError            calibration images, prompts or answers
    │   ├── StatisticsError        a statistics folder
    │   └── CodecError             a compressed weight that is truncated or altered
    └── ResourceError          5   the machine lacks something
        ├── SpaceError             disk or memory
        ├── DeviceError            an accelerator or a program that is not there
        ├── BusyError              another run writes the same folder
        ├── NoLocksError           the file system of the output has no locks
        ├── KeptError              the output is whole, but could not be put in its place; it is kept
        └── MeetingError           the other ranks of torchrun did not come

Exit code 3 is `glmq verify` saying that it found problems; 130 and 143 are Ctrl-C and SIGTERM.
Each message is one sentence that names the thing, what was wanted, what was found and what to do.
"""

from glmq.quoting import visible


class GlmqError(Exception):
    """Base of every error with a message meant for the user. Whatever it quotes from outside is made visible text."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))

    exit_code = 1
    code = "failed"
    """A stable word for machines, written by --json."""


class UsageError(GlmqError):
    exit_code = 2
    code = "usage"


class InputError(GlmqError):
    exit_code = 4
    code = "bad-input"


class CheckpointError(InputError):
    code = "bad-checkpoint"


class ModelError(InputError):
    code = "bad-model"


class SampleError(InputError):
    code = "bad-samples"


class StatisticsError(InputError):
    code = "bad-statistics"


class CodecError(InputError):
    code = "bad-compressed-weight"


class ResourceError(GlmqError):
    exit_code = 5
    code = "no-resource"


class SpaceError(ResourceError):
    code = "no-space"


class DeviceError(ResourceError):
    code = "no-device"


class EngineError(ResourceError):
    """A serving engine that was asked for is not installed."""

    code = "no-engine"


class BusyError(ResourceError):
    code = "busy"


class NoLocksError(ResourceError):
    code = "no-locks"


class KeptError(ResourceError):
    code = "kept"


class MeetingError(ResourceError):
    code = "no-ranks"


class LostRanksError(GlmqError):
    """Another rank is gone or does not answer."""


class OtherRankError(GlmqError):
    """Another rank stopped; the sentence is its."""
