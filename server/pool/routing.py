"""The router of a pool, without the base: what `loramux route` needs, and the server too."""

from typing import Any

from loramux.router.decision import STRATEGIES, RoutingOptions
from loramux.router.router import Router
from loramux.router.store import load_router
from loramux.server.pool.manifest import Pool, PoolError, read_pool, verify
from loramux.server.routing_settings import RoutingSettings
from loramux.server.settings import Settings


def open_pool(settings: Settings) -> Pool:
    """The pool of the settings, every file compared with its hash where that is asked for.

    Raises:
        PoolError: the first thing that is wrong.
    """
    pool = read_pool(settings.pool)
    problems = verify(settings.pool) if settings.verify_pool else []
    if problems:
        more = f" (and {len(problems) - 1} more; `loramux pool check` lists them)" if problems[1:] else ""
        raise PoolError(f"pool {settings.pool}: {problems[0]}{more}")
    return pool


def lay_out(encoder: Any) -> None:
    """Its layers by the faster library; a static encoder needs no torch, and never comes here."""
    from loramux.kernels.packed_linear import direct_linears

    direct_linears(encoder)


def load_pool_router(settings: Settings, pool: Pool) -> Router:
    """The router of a pool, with the settings' defaults.

    Raises:
        RouterError: one line that names the file or option at fault.
    """
    return load_router(
        pool.router_dir,
        experts=[entry.id for entry in pool.manifest.experts],
        encoder=settings.encoder,
        defaults=options_of(settings.routing),
        prepare=lay_out,
    )


def options_of(settings: RoutingSettings) -> RoutingOptions:
    """The configured defaults as routing options; a strategy that is none of the router's is not among them.

    Raises:
        RoutingOptionsError: a value that no router could serve.
    """
    return RoutingOptions(
        strategy=next((one for one in STRATEGIES if one == settings.strategy), None),
        top_m=settings.top_m,
        policy=settings.policy,
        temperature=settings.temperature,
        threshold=settings.threshold,
    )
