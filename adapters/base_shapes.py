"""The linear modules of a base model: what a LoRA may target, and with which shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from loramux.adapters.base_weights import BaseWeights
from loramux.adapters.errors import BaseMismatchError


@dataclass(frozen=True)
class BaseShapes:
    """Names and shapes of the linear modules of one base model.

    Attributes:
        id: name of the base, compared with `base_model_name_or_path` of an adapter.
        modules: module path, e.g. `model.layers.0.self_attn.q_proj`, -> (out_features, in_features).
        weights: its embeddings on disk, where its files are known.
    """

    id: str
    modules: Mapping[str, tuple[int, int]]
    weights: BaseWeights | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))

    @classmethod
    def from_model(
        cls, model: nn.Module, id: str, *, include_head: bool = False, folder: Path | None = None
    ) -> BaseShapes:
        """Read the shapes off a loaded model.

        Packed 4-bit and 8-bit layers of bitsandbytes derive from `nn.Linear` and keep their logical
        `in_features` and `out_features`, so the shape is never taken from the weight tensor.

        Args:
            model: the bare base, not wrapped by PEFT.
            id: name of the base.
            include_head: also list the output head (`lm_head`), which is left out by default.
            folder: its files, with which embeddings saved beside an adapter are compared.

        Raises:
            BaseMismatchError: the model has no linear module.
        """
        head = getattr(model, "get_output_embeddings", lambda: None)()
        modules = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and (include_head or module is not head)
        }
        if not modules:
            kinds = {type(module) for module in model.modules()}
            why = ": its projections are Conv1D, whose factors lie the other way round" * (Conv1D in kinds)
            raise BaseMismatchError(f"base {id!r}: {type(model).__name__} has no linear module to adapt{why}")
        return cls(id, modules, BaseWeights.of(model, folder) if folder is not None else None)

    @classmethod
    def from_config_dir(cls, path: str | Path, id: str, *, include_head: bool = False) -> BaseShapes:
        """Read the shapes from `config.json` alone: the model is built on the meta device, without weights.

        Raises:
            BaseMismatchError: there is no `config.json`, or no causal language model is known for it.
        """
        directory = Path(path)
        if not (directory / "config.json").is_file():
            raise BaseMismatchError(f"base {id!r}: {directory} holds no config.json")
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (ValueError, KeyError, OSError) as error:
            raise BaseMismatchError(f"base {id!r}: {directory / 'config.json'}: {error}") from error
        return cls.from_model(model, id, include_head=include_head, folder=directory)
