"""The CPU image, built and run without a Docker engine: by `make image`, for it takes minutes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.panels import DOCKER

MISSING = [tool for tool in ("buildah", "bwrap", "debootstrap") if shutil.which(tool) is None]


@pytest.mark.skipif(
    not os.environ.get("TRY_IMAGE"), reason="builds an image for minutes: run it by make image"
)
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.timeout(0)
def test_the_cpu_image_is_built_and_answers() -> None:
    base = ["--base", os.environ["BASE"]] if os.environ.get("BASE") else []
    done = subprocess.run(
        [sys.executable, str(DOCKER / "try_image.py"), *base], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0
    found = json.loads(done.stdout)
    print(done.stdout)
    assert found["healthy"]
    assert found["answer"].strip()
    assert found["experts"]
    assert set(found["kernels"]) == {path.parent.name for path in DOCKER.parent.glob("kernels/*/native.cpp")}
