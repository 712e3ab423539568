"""The application of Ray Serve: `import_path: loramux.server.ray.app:application` in its config files."""

from typing import Any

from loramux.server.ray.edge import Edge
from loramux.server.ray.engine import Engine
from loramux.server.ray.options import RayOptions

#: Requests that Ray lets through to the edge, which itself refuses what is too much, and to an engine, which
#: gets none in this way.
MAX_REQUESTS = 100_000
#: After the time that the settings give to requests: for Ray, to end what is left.
SPARE_SECONDS = 10.0


def application(options: RayOptions) -> Any:
    """An edge and `settings.replicas` engines, to be deployed by Ray Serve.

    Raises:
        StartError: as `RayOptions.load`, on the machine where this is called.
    """
    from ray import serve

    settings = options.load()
    told = options.model_dump(mode="json")
    leaving = settings.drain_seconds + SPARE_SECONDS
    both = {
        "max_ongoing_requests": MAX_REQUESTS,
        "health_check_period_s": 5.0,
        "graceful_shutdown_timeout_s": leaving,
    }
    engine = serve.deployment(Engine).options(
        name="engine",
        num_replicas=settings.replicas,
        max_replicas_per_node=options.per_machine,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        **both,
    )
    edge = serve.deployment(serve.ingress()(Edge)).options(name="edge", num_replicas=1, **both)
    return edge.bind(told, engine.bind(told))
