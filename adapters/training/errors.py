"""What can be wrong with training data, options or state.

TrainingError (AdapterError)
├── RowError         a data file or one of its lines is not usable
├── ChatError        a tokenizer cannot render chats
├── OptionError      options that cannot be met
├── CheckpointError  a checkpoint file cannot be resumed from
└── DivergedError    the loss is not a finite number any more
"""

from __future__ import annotations

from loramux.adapters.errors import AdapterError


class TrainingError(AdapterError):
    """Base of all training errors; the message is one line that says what to do."""


class RowError(TrainingError):
    """A data file or one of its lines is not usable; the message names the file and the line."""


class ChatError(TrainingError):
    """A tokenizer cannot render chats; the message says what it lacks."""


class OptionError(TrainingError):
    """Training options that cannot be met; the message names the option."""


class CheckpointError(TrainingError):
    """A checkpoint file cannot be resumed from; the message names the file and says why."""


class DivergedError(TrainingError):
    """The loss is not a finite number any more; the message says at which step."""
