"""`python benchmarks/quality/run.py small --data DIR --out DIR`: the experiment of docs/quality.md."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    add_package = runpy.run_path(str(Path(__file__).parents[1] / "run.py"))["add_package"]
    for package in ("benchmarks", "tests"):
        add_package(package)
    from benchmarks.quality.experiment import main

    main()
