"""Whether an adapter directory holds a sparse model or a plain LoRA."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from loramux.adapters.adapter_files import CONFIG_FILE, TENSOR_FILE, confined
from loramux.adapters.errors import AdapterError
from loramux.adapters.sparse.detect import detect
from loramux.adapters.sparse.fields import Fields

_MIXTURES = frozenset({"MIXLORA", "LORAMOE", "MOLA", "LORACOE"})


def is_sparse(folder: Path, root: Path | None = None) -> bool:
    """Look at the tensors' names.

    False for whatever cannot be told: the reader of plain LoRA then says what is wrong with the files.

    Args:
        root: directory that the files must lie in after resolving links; None means `folder` itself.
    """
    try:
        config = Fields.read(confined(folder, CONFIG_FILE, root))
        path = confined(folder, TENSOR_FILE, root)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            detect(path, names, peft_type=config.peek("peft_type"), metadata=file.metadata() or {})
    except (AdapterError, SafetensorError, OSError):
        return not (folder / TENSOR_FILE).exists() and _says_so(folder, root)
    return True


def _says_so(folder: Path, root: Path | None) -> bool:
    """Whether the config alone, of a directory without safetensors, is that of a mixture.

    Its reader then says what is to be done with the pickled weights.
    """
    try:
        config = Fields.read(confined(folder, CONFIG_FILE, root))
    except (AdapterError, OSError):
        return False
    kind = config.peek("peft_type")
    marked = any(config.peek(name) is not None for name in ("routing_strategy", "lora_nums"))
    return marked or (isinstance(kind, str) and kind.upper() in _MIXTURES)
