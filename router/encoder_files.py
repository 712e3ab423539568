"""Whether an encoder's directory is safe to load, and what identifies its content.

An encoder is a sentence-transformers directory (`modules.json`) or a plain Hugging Face model directory
(`config.json` only, which gets mean pooling and L2 normalisation as the E5 model cards ask). Weights are
safetensors or nothing; `modules.json` may name only the module classes listed here, because
sentence-transformers would import whatever it names.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import RouterFileError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MODULE_CLASSES = ("StaticEmbedding", "Transformer", "Pooling", "Normalize")
_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

READING_FILE = "reading.json"


@dataclass(frozen=True, slots=True)
class EncoderFiles:
    """A checked encoder directory: its kind, where the weights are, and how token vectors are pooled."""

    root: Path
    kind: Literal["static", "transformer"]
    weights_dir: Path
    pooling: str


def inspect_encoder(root: Path) -> EncoderFiles:
    """Check a directory before anything in it is loaded. Raises RouterFileError naming file and field."""
    modules_file = root / "modules.json"
    if not modules_file.is_file():
        _check_transformer(root)
        return EncoderFiles(root, "transformer", root, "mean")
    modules = read_json(modules_file)
    if not isinstance(modules, list) or not modules:
        raise RouterFileError(modules_file, "", "expected a non-empty list of modules")
    kinds: dict[str, Path] = {}
    for position, module in enumerate(modules):
        kind, folder = _module(modules_file, position, module)
        kinds[kind] = folder
    if "StaticEmbedding" in kinds:
        _require_safetensors(kinds["StaticEmbedding"])
        return EncoderFiles(root, "static", kinds["StaticEmbedding"], "mean")
    if "Transformer" not in kinds:
        raise RouterFileError(modules_file, "", "no Transformer or StaticEmbedding module")
    _check_transformer(kinds["Transformer"])
    pooling = _pooling_mode(kinds["Pooling"] / "config.json") if "Pooling" in kinds else "mean"
    return EncoderFiles(root, "transformer", kinds["Transformer"], pooling)


def fingerprint(files: EncoderFiles) -> str:
    """`sha256:` and 16 hex digits over the weights, tokenizer and configuration that decide the vectors."""
    digest = hashlib.sha256()
    names = ("config.json", "tokenizer.json", "vocab.txt", "sentence_bert_config.json")
    chosen = [files.weights_dir / name for name in names]
    chosen += sorted(files.weights_dir.glob("*.safetensors"))
    if files.weights_dir != files.root:
        chosen.append(files.root / "modules.json")
    chosen.append(files.root / READING_FILE)
    for path in chosen:
        if path.is_file():
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    digest.update(files.pooling.encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises RouterFileError for a missing, unreadable or malformed file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RouterFileError(path, "", "file is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RouterFileError(path, "", f"not readable as JSON: {error}") from None


def read_tokenizer(file: Path) -> "Tokenizer":
    """A `tokenizer.json` of the tokenizers library. Raises RouterFileError when it is not one."""
    from tokenizers import Tokenizer

    if not file.is_file():
        raise RouterFileError(file, "", "file is missing")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises a bare Exception for every parse failure
        raise RouterFileError(file, "", f"not a tokenizer: {error}") from None


def _module(modules_file: Path, position: int, module: Any) -> tuple[str, Path]:
    field = f"[{position}]"
    if not isinstance(module, dict) or not isinstance(module.get("type"), str):
        raise RouterFileError(modules_file, field, "expected an object with a type")
    package, _, kind = module["type"].rpartition(".")
    if not package.startswith("sentence_transformers.") or kind not in _MODULE_CLASSES:
        allowed = ", ".join(_MODULE_CLASSES)
        raise RouterFileError(modules_file, f"{field}.type", f"{module['type']!r} is not one of {allowed}")
    root = modules_file.parent.resolve()
    folder = (root / str(module.get("path", ""))).resolve()
    if folder != root and root not in folder.parents:
        raise RouterFileError(modules_file, f"{field}.path", "leaves the encoder directory")
    return kind, folder


def _check_transformer(folder: Path) -> None:
    config_file = folder / "config.json"
    config = read_json(config_file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise RouterFileError(config_file, "model_type", "missing: not a Hugging Face model directory")
    if "auto_map" in config:
        raise RouterFileError(config_file, "auto_map", "the model wants its own code to run; that is refused")
    _require_safetensors(folder)


def _require_safetensors(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        problem = "no safetensors weights (pickled .bin files are not loaded; convert them first)"
        raise RouterFileError(folder, "", problem)


def _pooling_mode(config_file: Path) -> str:
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise RouterFileError(config_file, "", "expected an object")
    mode = config.get("pooling_mode")
    if mode is None:
        active = [name for key, name in _LEGACY_POOLING.items() if config.get(key)]
        mode = "+".join(active) or "mean"
    elif isinstance(mode, list):
        mode = "+".join(map(str, mode))
    if config.get("include_prompt", True) is not True:
        raise RouterFileError(config_file, "include_prompt", "false is not supported")
    return str(mode)
