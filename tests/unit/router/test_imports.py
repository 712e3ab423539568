"""Starting fast: what importing the package and loading the demo kind of router may not pull in."""

import subprocess
import sys
from pathlib import Path

from loramux.router.decision import STRATEGIES
from loramux.router.encoder import Encoder
from loramux.router.fit.router import fit_router
from loramux.router.store import save_router
from tests.unit.router.kit import TOPICS, topic_pairs, write_static_encoder

PROGRAM = """
import sys
import loramux.router
assert not {"torch", "transformers", "faiss", "sentence_transformers"} & set(sys.modules), "on import"
router = loramux.router.load_router(__import__("pathlib").Path(sys.argv[1]))
[decision] = router.decide(["anchor the vessel"])
assert not {"torch", "transformers", "sentence_transformers", "sklearn"} & set(sys.modules), "on load"
print(decision.strategy)
"""


def test_a_router_with_a_static_encoder_needs_neither_torch_nor_sentence_transformers(tmp_path: Path) -> None:
    pairs, labels = topic_pairs(80, seed=41)
    texts = [text for text, _ in pairs]
    encoder = Encoder.load(write_static_encoder(tmp_path / "encoder", texts))
    state = fit_router(encoder.encode(texts).vectors, labels, list(TOPICS), encoder.spec)
    save_router(state, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in STRATEGIES
