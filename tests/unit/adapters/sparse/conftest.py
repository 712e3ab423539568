"""One small base for every test of a sparse reader."""

import pytest

from loramux.adapters.base_shapes import BaseShapes
from tests.sparse_kit import base_shapes, small_config


@pytest.fixture(scope="session")
def base() -> BaseShapes:
    return base_shapes(small_config())
