"""`python benchmarks/peers/run.py`: loramux beside its peers (compare.py), and with `gguf` as the first word
beside llama.cpp on the pool that ships (gguf_compare.py), with `answers` beside itself (gguf_answers.py)."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    for package in ("benchmarks", "tests"):
        runpy.run_path(str(Path(__file__).parents[1] / "run.py"))["add_package"](package)
    if sys.argv[1:2] == ["gguf"]:
        from benchmarks.peers.gguf_compare import main as compare_gguf

        compare_gguf(sys.argv[2:])
    elif sys.argv[1:2] == ["answers"]:
        from benchmarks.peers.gguf_answers import main as compare_answers

        compare_answers(sys.argv[2:])
    else:
        from benchmarks.peers.compare import main

        main()
