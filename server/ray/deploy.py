"""Ray Serve with the application on it: on a Ray of its own, or on a cluster that is there."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loramux.server.errors import StartError
from loramux.server.ray.options import RayOptions
from loramux.server.settings import Settings, api_keys

log = logging.getLogger("loramux")

#: What Serve calls the application.
NAME = "loramux"
#: Bytes of Ray's store of shared objects, which nothing here uses; Ray wants 75 MB at least.
STORE_BYTES = 80 * 2**20
MISSING = "Ray is not installed; pip install 'loramux[ray]'"


def shipped(settings: Settings) -> dict[str, Any]:
    """The settings that are not defaults, keys included, as another machine gets them."""
    found = settings.model_dump(
        mode="json", exclude_defaults=True, exclude={"api_keys", "api_key_file", "admin_key"}
    )
    if keys := api_keys(settings):
        found["api_keys"] = list(keys)
    if settings.admin_key is not None:
        found["admin_key"] = settings.admin_key.get_secret_value()
    return found


def connect(address: str | None, cpus: float) -> None:
    """Connect to a cluster, or start a Ray of this machine, for `cpus`, which ends with this process.

    Raises:
        StartError: Ray is not installed, or there is none at `address`.
    """
    # Said before Ray is imported: a Ray that we start reports nothing to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise StartError(MISSING) from None
    quiet = {"logging_level": logging.WARNING}
    try:
        if address is None:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=STORE_BYTES,
                num_cpus=max(1, round(cpus)),
                **quiet,
            )
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StartError(f"no Ray at {address or 'this machine'}: {_line(error)}") from None


def deploy(options: RayOptions, settings: Settings) -> None:
    """Deploy the application, and wait until it answers.

    Raises:
        StartError: it does not come up.
    """
    from ray import serve

    from loramux.server.ray.app import application

    quiet = {"log_level": "WARNING", "enable_access_log": False}
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port}, logging_config=quiet)
        serve.run(application(options), name=NAME, route_prefix="/", logging_config=quiet)
    except (RuntimeError, ValueError) as error:
        raise StartError(f"Ray Serve: {_cause() or _line(error)}") from None


@contextmanager
def told_to_end() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets."""
    told = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end() -> None:
    """Take the application down, and the Ray that was started for it."""
    import ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def _cause() -> str | None:
    """The last error that a deployment reports."""
    from ray import serve

    application = serve.status().applications.get(NAME)
    reports = [] if application is None else [one.message for one in application.deployments.values()]
    found = [line.strip() for report in reports for line in report.splitlines() if "Error: " in line]
    return found[-1] if found else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def gpus_each(engines: int) -> float:
    """GPUs for each of so many engines: one, or what there is shared out; 0 where the cluster has none."""
    import ray

    there = float(ray.cluster_resources().get("GPU", 0))
    return min(1.0, there / engines)
