"""`python benchmarks/peers/run.py`: loramux beside its peers; see compare.py."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[1] / "run.py"))["add_package"]("benchmarks")
    from benchmarks.peers.compare import main

    main()
