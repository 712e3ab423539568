"""Everything that can be wrong with an adapter or a blend.

AdapterError (ValueError)
├── AdapterFormatError          the files are damaged, incomplete or contradict themselves
│   └── AdapterPathError        a file resolves to a place outside the allowed directory
├── UnsupportedAdapterError     the files are sound, but ask for maths that is not served
├── BaseMismatchError           the adapter was made for another base model
└── BlendError                  a mixture of adapters cannot be formed or merged as asked

Every message names the directory, tensor or field and says why; most say what to do next.
"""


class AdapterError(ValueError):
    """Base of all adapter and blend errors."""


class AdapterFormatError(AdapterError):
    """An adapter directory is damaged, incomplete, or its config and tensors disagree."""


class AdapterPathError(AdapterFormatError):
    """A file of an adapter directory resolves to a place outside the allowed directory."""


class UnsupportedAdapterError(AdapterError):
    """An adapter uses a feature that would change the result and that is not served."""


class BaseMismatchError(AdapterError):
    """An adapter names another base model, or its modules and shapes do not fit this one."""


class BlendError(AdapterError):
    """Weights, method or options of a blend are not acceptable, or its parts do not fit together."""
