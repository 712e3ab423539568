"""Sparse models from their files, whoever wrote them: whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loramux.adapters.adapter_files import CONFIG_FILE, TENSOR_FILE, confined
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterFormatError, UnsupportedAdapterError
from loramux.adapters.sparse.blueprint import Blueprint, Parts
from loramux.adapters.sparse.detect import Container, detect
from loramux.adapters.sparse.fields import Fields
from loramux.adapters.sparse.linear_mixtures import loramoe, mola
from loramux.adapters.sparse.loracoe import loracoe
from loramux.adapters.sparse.loramoe_original import loramoe_with_paths
from loramux.adapters.sparse.mixlora import mixlora
from loramux.adapters.sparse.model import ExpertMixture, Kind, SparseModel
from loramux.adapters.sparse.options import DEFAULT, ReadOptions
from loramux.adapters.sparse.tensor_file import TensorFile

_PEFT_TYPES = {
    Container.MIXLORA: ("MIXLORA",),
    Container.LORAMOE: ("LORAMOE",),
    Container.MOLA: ("MOLA",),
    Container.LORAMOE_PATHS: ("LORA", "LORAMOE"),
    Container.LORACOE: ("LORACOE",),
}


@dataclass(frozen=True)
class SparseSize:
    """What a sparse model holds in memory.

    Attributes:
        parameters: numbers in all tensors, routers included.
        router_parameters: those in routers, which are kept in float32.
    """

    kind: Kind
    parameters: int
    router_parameters: int

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes with factors in `dtype`."""
        return (self.parameters - self.router_parameters) * dtype.itemsize + 4 * self.router_parameters


def read_sparse(
    folder: str | Path,
    *,
    id: str,
    base: BaseShapes,
    dtype: torch.dtype | None = None,
    options: ReadOptions = DEFAULT,
    root: str | Path | None = None,
) -> SparseModel:
    """Read and check the directory of a sparse model; all or nothing.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        id: the name the model gets.
        base: the model it must fit.
        dtype: convert the factors; None keeps the type of the file, float32 where it mixes types. Routers are
            float32 always.
        options: what the operator decided about it.
        root: directory that both files must lie in after resolving links; None means `folder` itself.

    Returns:
        The model. Its content hash covers every tensor and whatever else decides what it says; it is the same
        for every layout of the keys and whatever `id` and `dtype` are.

    Raises:
        AdapterFormatError: files missing, damaged, or at odds with each other; NaN, infinity, or no effect.
        AdapterPathError: a file lies outside `root`.
        UnsupportedAdapterError: a method or feature that is not served.
        BaseMismatchError: made for another base, by name, by modules or by shapes.
    """
    with _opened(Path(folder), base, options, root) as (blueprint, file):
        file.check(blueprint.wanted, base, dtype)
        parts = blueprint.build(file)
        _refuse_no_effect(parts, file.path)
        return SparseModel(
            id=id,
            kind=blueprint.kind,
            content_hash=file.digest({"kind": blueprint.kind, **blueprint.meaning}),
            plain=MappingProxyType(dict(parts.plain)),
            linear=MappingProxyType(dict(parts.linear)),
            ffn=MappingProxyType(dict(parts.ffn)),
            summary=MappingProxyType(dict(blueprint.summary)),
        )


def measure_sparse(
    folder: str | Path,
    *,
    base: BaseShapes,
    options: ReadOptions = DEFAULT,
    root: str | Path | None = None,
) -> SparseSize:
    """What `read_sparse` would hold in memory, without reading a tensor. Arguments as there.

    Raises:
        AdapterError: as `read_sparse`, as far as config and header show it.
    """
    with _opened(Path(folder), base, options, root) as (blueprint, file):
        file.check(blueprint.wanted, base, None)
        return SparseSize(blueprint.kind, blueprint.parameters, blueprint.router_parameters)


@contextmanager
def _opened(
    folder: Path, base: BaseShapes, options: ReadOptions, root: str | Path | None
) -> Iterator[tuple[Blueprint, TensorFile]]:
    config = confined(folder, CONFIG_FILE, root)
    path = confined(folder, TENSOR_FILE, root)
    fields = Fields.read(config)
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            blueprint = _blueprint(fields, path, keys, base, options, file.metadata() or {})
            yield blueprint, TensorFile(path, file, blueprint.naming, blueprint.stranger)
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{path}: not a readable safetensors file: {error}") from error


def _blueprint(
    fields: Fields,
    path: Path,
    keys: list[str],
    base: BaseShapes,
    options: ReadOptions,
    metadata: dict[str, str],
) -> Blueprint:
    container = detect(path, keys, peft_type=fields.peek("peft_type"), metadata=metadata)
    named = fields.peek("peft_type")
    if named is not None and named not in _PEFT_TYPES[container]:
        raise AdapterFormatError(
            f"{fields.path}: peft_type is {named!r}, but the tensors in {TENSOR_FILE} are {container}"
        )
    if fields.peek("task_type") == "SEQ_CLS":
        raise UnsupportedAdapterError(
            f"{fields.path}: task_type is 'SEQ_CLS': it classifies sequences, and only text is generated here"
        )
    fields.check_base(base.id, override=options.any_base)
    match container:
        case Container.MIXLORA:
            blueprint = mixlora(fields, path, keys, base, options)
        case Container.LORAMOE:
            blueprint = loramoe(fields, path, base, options)
        case Container.MOLA:
            blueprint = mola(fields, path, base, options)
        case Container.LORAMOE_PATHS:
            blueprint = loramoe_with_paths(fields, path, keys, base)
        case Container.LORACOE:
            blueprint = loracoe(fields, path, keys, base, options, metadata)
    fields.finish()
    return blueprint


def _refuse_no_effect(parts: Parts, path: Path) -> None:
    """Refuse a model that changes nothing: an untrained one, or one saved with its weights lost."""
    if not any(a.any() and b.any() for a, b in _factors(parts)):
        raise AdapterFormatError(
            f"{path}: delta W is zero in every module (A or B is zero): an untrained model, or one whose "
            "weights were lost when it was saved"
        )


def _factors(parts: Parts) -> Iterable[tuple[Tensor, Tensor]]:
    for pair in parts.plain.values():
        yield pair.a, pair.b
    for mixture in parts.linear.values():
        factors = mixture.factors if isinstance(mixture, ExpertMixture) else mixture
        yield factors.a, factors.b
    for block in parts.ffn.values():
        for experts in block.projections.values():
            yield experts.a, experts.b
