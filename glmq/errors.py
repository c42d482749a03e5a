"""The exceptions that glmq raises for its user, and the code and exit code of each.

Every class that is raised has a stable code, whose first digit is the exit code: one kind of cause, one way to cure it.
docs/errors.md explains them. A class without a code of its own, such as InputError, only gathers others for `except`.

    GlmqError                     E101  an unexpected failure, or a sentence of another program
    ├── LostRanksError            E102  another rank of torchrun is gone or does not answer
    ├── OtherRankError            E103  another rank stopped; the sentence is its
    ├── SharedDiskError           E104  the ranks do not see the same disk
    ├── UsageError                E201  options contradict each other, or a value is out of range
    │   ├── OutputError           E202  nothing can be written to that place
    │   ├── ResumeError           E203  an interrupted run lies there, or is not this one
    │   ├── PatternError          E204  a pattern of names that matches nothing, or what cannot be
    │   ├── LaunchError           E205  started by torchrun where that does not fit
    │   └── TargetError           E206  the engine does not load what was asked for
    ├── InputError                      what was given to work on is wrong
    │   ├── CheckpointError       E401  tensors, shapes, types or descriptions do not belong together
    │   │   ├── DamagedError      E402  a file is truncated, altered or not what its name says
    │   │   ├── WrongFolderError  E403  the folder is of another kind than the command works on
    │   │   ├── ForeignError      E404  quantized by another method, or an adapter that is not merged
    │   │   ├── DtypeRangeError   E405  a value is too large for the dtype of the output
    │   │   ├── UnreadableError   E406  a file cannot be opened
    │   │   ├── VersionError      E407  written by another version of glmq
    │   │   ├── LeftOverError     E408  what an interrupted run left cannot be gone on from
    │   │   └── PlanError         E409  glmq did not do what it had planned
    │   ├── ModelError            E411  config.json contradicts itself or misses a value
    │   │   ├── OtherModelError   E412  the model is of another kind
    │   │   └── SideFileError     E413  the tokenizer, chat template or processor file
    │   ├── SampleError           E421  calibration samples, prompts or answers
    │   │   ├── PictureError      E422  pictures that cannot be used
    │   │   └── NonFiniteError    E423  a sample makes the model overflow
    │   ├── StatisticsError       E431  a statistics folder
    │   │   └── OtherStatisticsError  E432  statistics of other weights, samples or options
    │   └── CodecError            E441  a compressed weight that is truncated or altered
    │       └── TooLargeError     E442  a weight is larger than the vendor's compress program takes
    └── ResourceError                   the machine lacks something
        ├── SpaceError            E501  disk
        │   └── MemoryShortError  E502  memory
        ├── DeviceError           E511  an accelerator
        │   ├── CompressProgramError  E512  the vendor's compress program
        │   └── KernelError       E513  a compiled kernel
        ├── EngineError           E521  a serving engine is not installed
        ├── BusyError             E531  another run writes the same folder
        ├── NoLocksError          E532  the file system of the output has no locks
        ├── KeptError             E533  the output is whole, but could not be put in its place; it is kept
        └── MeetingError          E541  the other ranks of torchrun did not come

Exit code 3 is `glmq verify` saying that it found problems; 130 and 143 are Ctrl-C and SIGTERM.
Each message is one sentence that names the thing, what was wanted, what was found and what to do.
"""

from typing import Final

from glmq.quoting import visible

INTERRUPTED: Final = "GLMQ-E130"
"""Code of Ctrl-C."""
TERMINATED: Final = "GLMQ-E143"
"""Code of SIGTERM."""


class GlmqError(Exception):
    """Base of every error with a message meant for the user. Whatever it quotes from outside is made visible text."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))

    exit_code = 1
    code = "GLMQ-E101"
    """Stable, for machines, searches and docs/errors.md; shown before the sentence and written by --json."""


class LostRanksError(GlmqError):
    """Another rank is gone or does not answer."""

    code = "GLMQ-E102"


class OtherRankError(GlmqError):
    """Another rank stopped; the sentence is its."""

    code = "GLMQ-E103"


class SharedDiskError(GlmqError):
    """A rank does not see the folder that rank 0 made."""

    code = "GLMQ-E104"


class UsageError(GlmqError):
    """Options contradict each other, or a value is out of range."""

    exit_code = 2
    code = "GLMQ-E201"


class OutputError(UsageError):
    """Nothing can be written to the place that was named."""

    code = "GLMQ-E202"


class ResumeError(UsageError):
    """An interrupted run lies in the place of the output, or is not the one to be resumed."""

    code = "GLMQ-E203"


class PatternError(UsageError):
    """A pattern of names matches nothing, or asks for what cannot be."""

    code = "GLMQ-E204"


class LaunchError(UsageError):
    """The processes were not started as this command wants them."""

    code = "GLMQ-E205"


class TargetError(UsageError):
    """The engine that the checkpoint is made for does not load what was asked for."""

    code = "GLMQ-E206"


class InputError(GlmqError):
    """What was given to work on is wrong."""

    exit_code = 4


class CheckpointError(InputError):
    """Tensors, shapes, types or descriptions of a checkpoint do not belong together."""

    code = "GLMQ-E401"


class DamagedError(CheckpointError):
    """A file is truncated, altered, or not what its name says."""

    code = "GLMQ-E402"


class WrongFolderError(CheckpointError):
    """The folder is of another kind than the command works on."""

    code = "GLMQ-E403"


class ForeignError(CheckpointError):
    """A checkpoint quantized by another method, or an adapter that is not merged."""

    code = "GLMQ-E404"


class DtypeRangeError(CheckpointError):
    """A value is too large for the dtype of the output."""

    code = "GLMQ-E405"


class UnreadableError(CheckpointError):
    """A file cannot be opened or is no regular file."""

    code = "GLMQ-E406"


class VersionError(CheckpointError):
    """A file was written by a version of glmq that this one does not read."""

    code = "GLMQ-E407"


class LeftOverError(CheckpointError):
    """What an interrupted run left cannot be gone on from."""

    code = "GLMQ-E408"


class PlanError(CheckpointError):
    """What was to be written is not what had been planned: a bug."""

    code = "GLMQ-E409"


class ModelError(InputError):
    """A config.json that misses a value or contradicts itself."""

    code = "GLMQ-E411"


class OtherModelError(ModelError):
    """A model of another kind than glmq knows."""

    code = "GLMQ-E412"


class SideFileError(ModelError):
    """The tokenizer, the chat template or the processor's file."""

    code = "GLMQ-E413"


class SampleError(InputError):
    """Calibration samples, prompts or answers."""

    code = "GLMQ-E421"


class PictureError(SampleError):
    """Pictures that cannot be used."""

    code = "GLMQ-E422"


class NonFiniteError(SampleError):
    """A sample makes the model overflow."""

    code = "GLMQ-E423"


class StatisticsError(InputError):
    """A statistics folder that is unfinished, damaged, or of no use."""

    code = "GLMQ-E431"


class OtherStatisticsError(StatisticsError):
    """Statistics of other weights, samples or options than the command names."""

    code = "GLMQ-E432"


class CodecError(InputError):
    """A compressed weight that is truncated or altered."""

    code = "GLMQ-E441"


class TooLargeError(CodecError):
    """A weight is larger than the vendor's compress program takes."""

    code = "GLMQ-E442"


class ResourceError(GlmqError):
    """The machine lacks something."""

    exit_code = 5


class SpaceError(ResourceError):
    """Disk."""

    code = "GLMQ-E501"


class MemoryShortError(SpaceError):
    """Memory."""

    code = "GLMQ-E502"


class DeviceError(ResourceError):
    """An accelerator that is not there or not fit."""

    code = "GLMQ-E511"


class CompressProgramError(DeviceError):
    """The vendor's compress program is missing, or failed."""

    code = "GLMQ-E512"


class KernelError(DeviceError):
    """A compiled kernel that was not built, or that this processor does not run."""

    code = "GLMQ-E513"


class EngineError(ResourceError):
    """A serving engine that was asked for is not installed."""

    code = "GLMQ-E521"


class BusyError(ResourceError):
    """Another run writes the same folder."""

    code = "GLMQ-E531"


class NoLocksError(ResourceError):
    """The file system of the output has no locks."""

    code = "GLMQ-E532"


class KeptError(ResourceError):
    """The output is whole, but could not be put in its place; it is kept."""

    code = "GLMQ-E533"


class MeetingError(ResourceError):
    """The other ranks of torchrun did not come."""

    code = "GLMQ-E541"
