"""A router directory on disk: `router.json` says what it is, `router.safetensors` holds the numbers.

router.json         strict keys; experts in order, encoder, classifier, calibration
router.safetensors  centroids [k, d], corpus_mean [d], classifier.weight [k, d], classifier.bias [k],
                    familiarity.means [k, d], familiarity.precision [d, d], familiarity.general [b, d],
                    samples.vectors [s, d] float16, samples.labels [s]
encoder/            the embedder, when the router brings its own (else a package's or the hub's)
classifier/         a fine-tuned sequence classifier, when `classifier.kind` is "transformer"
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .classifier import Classifier, LinearClassifier, TransformerClassifier
from .decision import STRATEGIES, RoutingOptions
from .encoder import Encoder, EncoderSpec
from .encoder_place import Package
from .errors import RouterError, RouterFileError, RoutingOptionsError
from .familiarity import Familiarity
from .header import FORMAT, NEWEST_VERSION, VERSION, Header, read_header
from .packages import package_folder
from .router import DEFAULTS, Router
from .state import RouterState, Samples
from .transformer_backend import Prepare

ROUTER_FILE, TENSORS_FILE = "router.json", "router.safetensors"


def save_router(
    state: RouterState,
    folder: Path,
    *,
    encoder_path: str | None = "encoder",
    encoder_package: Package | None = None,
    transformer_classifier: str | None = None,
) -> None:
    """Write a router directory. Paths are relative to it; each file is replaced whole.

    `encoder_path` None means that the encoder comes from `encoder_package`, or else that its id is a hub id
    to be found in the local cache.
    `transformer_classifier` names the folder of a sequence classifier that replaces the linear head.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, npt.NDArray[Any]] = {
        "centroids": np.ascontiguousarray(state.centroids, np.float32),
        "corpus_mean": np.ascontiguousarray(state.corpus_mean, np.float32),
    }
    classifier: dict[str, str | None] | None = None
    if transformer_classifier is not None:
        classifier = {"kind": "transformer", "path": transformer_classifier}
    elif state.classifier is not None:
        classifier = {"kind": "linear", "path": None}
        tensors["classifier.weight"] = np.ascontiguousarray(state.classifier.weight)
        tensors["classifier.bias"] = np.ascontiguousarray(state.classifier.bias)
    curve: dict[str, float | bool] | None = None
    general = None if state.familiarity is None else state.familiarity.general
    newest = encoder_package is not None or general is not None
    if state.familiarity is not None:
        curve = {"center": state.familiarity.center, "scale": state.familiarity.scale}
        if newest:
            curve["general"] = general is not None
        tensors["familiarity.means"] = np.ascontiguousarray(state.familiarity.means, np.float32)
        tensors["familiarity.precision"] = np.ascontiguousarray(state.familiarity.precision, np.float32)
    if general is not None:
        tensors["familiarity.general"] = np.ascontiguousarray(general, np.float32)
    if state.samples is not None:
        tensors["samples.vectors"] = np.ascontiguousarray(state.samples.vectors, np.float16)
        tensors["samples.labels"] = np.ascontiguousarray(state.samples.labels, np.int32)
    encoder: dict[str, Any] = {**asdict(state.encoder), "path": encoder_path}
    if encoder_package is not None:
        encoder["path"] = None
    if newest:
        encoder["package"] = None if encoder_package is None else asdict(encoder_package)
    content = {
        "format": FORMAT,
        "version": NEWEST_VERSION if newest else VERSION,
        "experts": list(state.experts),
        "encoder": encoder,
        "classifier": classifier,
        "calibration": {strategy: asdict(state.calibration[strategy]) for strategy in STRATEGIES},
        "hybrid_weight": state.hybrid_weight,
        "centring": state.centring,
        "familiarity": curve,
    }
    scratch = folder / (TENSORS_FILE + ".partial")
    save_file(tensors, scratch)
    os.replace(scratch, folder / TENSORS_FILE)
    scratch = folder / (ROUTER_FILE + ".partial")
    scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, folder / ROUTER_FILE)


def load_state(folder: Path) -> RouterState:
    """Read a router directory without its encoder. Raises RouterFileError naming file and field."""
    return _state(folder, read_header(folder / ROUTER_FILE))


def _state(folder: Path, header: Header) -> RouterState:
    experts, spec = header.experts, header.encoder
    tensors_file = folder / TENSORS_FILE
    tensors = _tensors(tensors_file)
    count, dimension = len(experts), spec.dimension
    means = _tensor(tensors_file, tensors, "centroids", (count, dimension))
    lengths = np.linalg.norm(means.astype(np.float64), axis=1)
    if np.abs(lengths - 1).max() > 1e-3:
        worst = int(np.abs(lengths - 1).argmax())
        problem = f"row {worst} ({experts[worst]}) has length {lengths[worst]:.4g}, not 1"
        raise RouterFileError(tensors_file, "centroids", problem)
    head = None
    if header.classifier == "linear":
        weight = _tensor(tensors_file, tensors, "classifier.weight", (count, dimension))
        head = LinearClassifier(weight, _tensor(tensors_file, tensors, "classifier.bias", (count,)))
    return RouterState(
        experts=experts,
        encoder=spec,
        centroids=means,
        corpus_mean=_tensor(tensors_file, tensors, "corpus_mean", (dimension,)),
        classifier=head,
        calibration=header.calibration,
        hybrid_weight=header.hybrid_weight,
        centring=header.centring,
        samples=_samples(tensors_file, tensors, count, dimension),
        familiarity=_familiarity(tensors_file, tensors, header, dimension),
    )


def encoder_elsewhere(folder: Path) -> str | None:
    """The package or hub id that a router directory's encoder comes from; None for its own, or where the
    header cannot be read."""
    try:
        header = read_header(folder / ROUTER_FILE)
    except RouterError:
        return None
    if header.encoder_package is not None:
        return header.encoder_package.name
    return None if header.encoder_path is not None else header.encoder.id


def load_router(
    folder: Path,
    *,
    experts: Sequence[str] | None = None,
    encoder: str | Path | None = None,
    encoder_id: str | None = None,
    defaults: RoutingOptions = DEFAULTS,
    device: str = "cpu",
    prepare: Prepare | None = None,
) -> Router:
    """Load a router directory with its encoder and classifier, ready to decide.

    `experts`: the pool's ids, which must be exactly the router's. `encoder`: a directory or cached hub id to
    use instead of the stored one; it must be the model the centroids were made with (`encoder_id` overrides
    the id it is compared by), `prepare` as `Encoder.load` has it. Raises RouterFileError naming file and
    field, one line.
    """
    file = folder / ROUTER_FILE
    header = read_header(file)
    state = _state(folder, header)
    if experts is not None and set(experts) != set(state.experts):
        missing, unknown = (
            sorted(set(experts) - set(state.experts)),
            sorted(set(state.experts) - set(experts)),
        )
        raise RouterFileError(
            file, "experts", f"differ from the pool's: missing {missing}, unknown {unknown}"
        )
    loaded = _load_encoder(folder, header, encoder, encoder_id, device, prepare)
    _same_encoder(file, state.encoder, loaded.spec, header.encoder_package)
    classifier: Classifier | None = None
    if header.classifier_path is not None:
        place = _inside(folder, file, "classifier.path", header.classifier_path)
        prefix, limit = state.encoder.prefix, state.encoder.max_tokens
        classifier = TransformerClassifier.load(place, state.experts, prefix=prefix, max_tokens=limit)
    try:
        return Router(state, loaded, classifier, defaults)
    except RoutingOptionsError:
        raise
    except RouterError as error:
        raise RouterFileError(file, "", str(error)) from None


def _load_encoder(
    folder: Path,
    header: Header,
    override: str | Path | None,
    override_id: str | None,
    device: str,
    prepare: Prepare | None,
) -> Encoder:
    location: str | Path
    spec, path, identity = header.encoder, header.encoder_path, override_id
    if override is not None:
        location = override
    elif header.encoder_package is not None:
        location = header.encoder_package.name
        if package_folder(location) is None:
            problem = f"{location} is not installed; {header.encoder_package.advice}"
            raise RouterFileError(folder / ROUTER_FILE, "encoder.package", problem)
    elif path is not None:
        location = _inside(folder, folder / ROUTER_FILE, "encoder.path", path)
        if not spec.id.startswith("sha256:"):
            identity = identity or spec.id
    else:
        location = spec.id
    return Encoder.load(
        location,
        id=identity,
        prefix=spec.prefix,
        max_tokens=spec.max_tokens,
        device=device,
        prepare=prepare,
    )


def _same_encoder(file: Path, stored: EncoderSpec, loaded: EncoderSpec, package: Package | None) -> None:
    for field in fields(EncoderSpec):
        want, have = getattr(stored, field.name), getattr(loaded, field.name)
        if want != have:
            use = "use that encoder" if package is None else f"use that of the wheel ({package.advice})"
            problem = (
                f"the centroids were made with {want!r}, the encoder has {have!r}; "
                f"{use}, or fit the router again with this one"
            )
            raise RouterFileError(file, f"encoder.{field.name}", problem)


def _samples(file: Path, tensors: dict[str, npt.NDArray[Any]], count: int, dimension: int) -> Samples | None:
    if "samples.vectors" not in tensors and "samples.labels" not in tensors:
        return None
    labels = tensors.get("samples.labels")
    if labels is None or labels.ndim != 1 or labels.dtype.kind != "i":
        raise RouterFileError(file, "samples.labels", "missing, or not a list of whole numbers")
    if len(labels) and not (labels.min() >= 0 and labels.max() < count):
        raise RouterFileError(file, "samples.labels", f"must be from 0 to {count - 1}")
    vectors = _tensor(file, tensors, "samples.vectors", (len(labels), dimension))
    return Samples(vectors, labels.astype(np.int64))


def _familiarity(
    file: Path, tensors: dict[str, npt.NDArray[Any]], header: Header, dimension: int
) -> Familiarity | None:
    if header.familiarity is None:
        return None
    means = _tensor(file, tensors, "familiarity.means", (len(header.experts), dimension))
    precision = _tensor(file, tensors, "familiarity.precision", (dimension, dimension))
    general = None
    if header.general:
        count = len(tensors.get("familiarity.general", ()))
        general = _tensor(file, tensors, "familiarity.general", (count, dimension))
    return Familiarity(means, precision, *header.familiarity, general)


def _tensors(file: Path) -> dict[str, npt.NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not file.is_file():
        raise RouterFileError(file, "", "file is missing")
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RouterFileError(file, "", f"not readable as safetensors: {error}") from None


def _tensor(
    file: Path, tensors: dict[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    if name not in tensors:
        raise RouterFileError(file, name, "tensor is missing")
    array = tensors[name]
    if array.shape != shape:
        raise RouterFileError(file, name, f"has shape {list(array.shape)}, expected {list(shape)}")
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise RouterFileError(file, name, "holds NaN, infinity, or is not floating point")
    return array.astype(np.float32)


def _inside(folder: Path, file: Path, field: str, path: str) -> Path:
    root = folder.resolve()
    place = (root / path).resolve()
    if root not in place.parents:
        raise RouterFileError(file, field, f"{path!r} leaves the router directory")
    if not place.is_dir():
        raise RouterFileError(place, "", "directory is missing")
    return place
