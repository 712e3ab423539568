"""Training every model of a setting once for each seed, all on the same rows of that seed."""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.quality.nf4 import write_nf4
from benchmarks.quality.setting import Model, Setting, SettingError
from benchmarks.quality.texts import training_rows
from loramux.adapters.training.expert import ExpertOptions
from loramux.adapters.training.loracoe import LoraCoeOptions
from loramux.adapters.training.loramoe import LoraMoeOptions
from loramux.adapters.training.mixlora import MixLoraOptions
from loramux.adapters.training.mixture import train_mixture
from loramux.adapters.training.rows import read_rows
from loramux.adapters.training.run import RunOptions, Work, examples_for, fit
from loramux.server.base_files import BaseFiles
from loramux.server.pool.add_sparse import add_sparse
from loramux.server.pool.build import BuildOptions, build_pool
from loramux.server.pool.training_base import load_training_base

SPARSE = {"mixlora": MixLoraOptions, "loramoe": LoraMoeOptions, "loracoe": LoraCoeOptions}
BASE_ID = "base"


@dataclass(frozen=True)
class Trained:
    """What a training left.

    pool: what is served. base: the folder that is served under it. rows: what it was trained on. tokens: of
    training, prompts and padding-free, as steps times their mean size. parameters: trained, of all experts.
    seconds: of processor time.
    """

    pool: Path
    base: Path
    rows: Path
    sparse: str | None
    steps: int
    tokens: int
    parameters: int
    seconds: float
    inputs: str

    @classmethod
    def read(cls, file: Path) -> "Trained | None":
        """What `write` wrote, if anything."""
        if not file.is_file():
            return None
        content = json.loads(file.read_text())
        return cls(**{**content, **{key: Path(content[key]) for key in ("pool", "base", "rows")}})

    def write(self, file: Path) -> None:
        """As JSON."""
        file.write_text(
            json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in asdict(self).items()})
        )


class Trainer:
    """Makes the models of a setting in a folder; what is there is not made again."""

    def __init__(self, setting: Setting, data: Path, out: Path) -> None:
        self.setting, self.data, self.out = setting, data, out
        for name in ("models", "rows", "bases"):
            (out / name).mkdir(parents=True, exist_ok=True)
        self.base = Path(BaseFiles.locate(setting.base).folder)
        if setting.chat_template is not None:
            self.base = _with_template(self.base, out / "bases" / "plain", setting.chat_template)
        self._opened: tuple[Path, Any, Any] | None = None

    def tokenizer(self) -> Any:
        """The base's."""
        return self._open(self.base)[1]

    def trained(self, model: Model, seed: int) -> Trained:
        """Train, unless it is done."""
        folder = self.out / "models" / f"{model.name}-s{seed}"
        file = folder.with_name(f"{folder.name}.json")
        inputs = self.setting.inputs(model, seed)
        if (before := Trained.read(file)) is not None and before.inputs == inputs:
            return before
        rows = training_rows(self.setting, self.data, seed, self.tokenizer(), self.out / "rows" / f"s{seed}")
        base = self.base if model.base == "plain" else write_nf4(self.base, self.out / "bases" / "nf4")
        print(f"training {folder.name}", flush=True)
        started = time.process_time()
        if model.kind == "pool":
            found = self._pool(model, seed, folder, base, rows)
        elif model.kind == "full":
            found = self._full(model, seed, folder, base, rows)
        else:
            found = self._sparse(model, seed, folder, base, rows)
        pool, base, sparse, steps, parameters = found
        tokens = steps * self.setting.step_tokens
        seconds = round(time.process_time() - started, 1)
        done = Trained(pool, base, rows, sparse, steps, tokens, parameters, seconds, inputs)
        done.write(file)
        return done

    def _pool(
        self, model: Model, seed: int, folder: Path, base: Path, rows: Path
    ) -> tuple[Path, Path, None, int, int]:
        setting = self.setting
        options = BuildOptions(
            base=str(base),
            base_id=BASE_ID,
            name=model.name,
            copy_base=False,
            encoder=setting.encoder,
            experts=model.experts,
            min_rows=setting.min_rows,
            held_out=0.0,
            device="cpu",
            seed=seed,
            expert=ExpertOptions(**self._options(model, seed)),
        )
        report = build_pool([rows], folder, options)
        shapes = _shapes(base)
        per_rank = sum(n_in + n_out for n_out, n_in in shapes)
        parameters = per_rank * (model.rank or setting.rank) * len(report.experts)
        return folder, base, None, sum(line.steps for line in report.experts), parameters

    def _full(
        self, model: Model, seed: int, folder: Path, base: Path, rows: Path
    ) -> tuple[Path, Path, None, int, int]:
        """Every weight, in float32. The pool of the single LoRA is served around it, unasked."""
        carrier = self._carrier(model, seed)
        options = RunOptions(**{**self._options(model, seed), "rate": model.rate or self.setting.full_rate})
        work = Work(folder, "full", options, str(base), str(seed))
        network, tokenizer = load_training_base(str(base), device="cpu")
        network.requires_grad_(True)
        examples = examples_for(tokenizer, read_rows([rows]), [], options, model.name)
        steps = fit(
            network,
            examples,
            options,
            state_file=work.folder / "state.safetensors",
            fingerprint=work.fingerprint,
            label=model.name,
        )
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.rmtree(work.folder)
        return carrier.pool, folder, None, steps, sum(p.numel() for p in network.parameters())

    def _sparse(
        self, model: Model, seed: int, folder: Path, base: Path, rows: Path
    ) -> tuple[Path, Path, str, int, int]:
        carrier = self._carrier(model, seed)
        network, tokenizer = self._open(base)
        files = BaseFiles.locate(str(base))
        adapter = folder.with_name(f"{folder.name}.adapter")
        options = SPARSE[model.kind](**self._options(model, seed))
        report = train_mixture(
            network, tokenizer, read_rows([rows]), [], adapter, options,
            base_id=BASE_ID, base_hash=files.hash, label=model.name,
        )  # fmt: skip
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(carrier.pool, folder)
        add_sparse(folder, adapter, id=model.kind)
        return folder, base, model.kind, report.steps, report.parameters

    def _carrier(self, model: Model, seed: int) -> Trained:
        """The pool of one LoRA on the same base, which brings a router that is not asked."""
        for other in self.setting.models:
            if other.kind == "pool" and other.experts == 1 and other.base == model.base:
                return self.trained(other, seed)
        raise SettingError(f"{model.name}: the setting needs a single LoRA on the base {model.base!r} too")

    def _options(self, model: Model, seed: int) -> dict[str, Any]:
        setting = self.setting
        rank = model.rank or setting.rank
        return {
            "rank": rank,
            "alpha": model.alpha or setting.alpha * rank / setting.rank,
            "rate": model.rate or setting.rate,
            "epochs": 1.0,
            "max_tokens": setting.max_tokens,
            "step_tokens": setting.step_tokens,
            "batch_tokens": setting.batch_tokens,
            "held_out_rows": 0,
            "seed": seed,
            **model.options,
        }

    def _open(self, base: Path) -> tuple[Any, Any]:
        if self._opened is None or self._opened[0] != base:
            self._opened = None
            self._opened = (base, *load_training_base(str(base), device="cpu"))
        return self._opened[1], self._opened[2]


def _with_template(base: Path, out: Path, template: str) -> Path:
    """A copy of a model folder whose tokenizer has a chat template."""
    if not (out / "done").is_file():
        shutil.copytree(base, out, dirs_exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(out)
        (out / "done").write_text("")
    return out


def _shapes(base: Path) -> list[tuple[int, int]]:
    from loramux.adapters.base_shapes import BaseShapes
    from loramux.adapters.training.expert import ALL_PROJECTIONS

    shapes = BaseShapes.from_config_dir(base, BASE_ID).modules
    return [shape for path, shape in shapes.items() if path.rpartition(".")[2] in ALL_PROJECTIONS]
