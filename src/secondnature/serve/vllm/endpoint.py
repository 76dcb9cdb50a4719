"""The door into vLLM's API server: the entry point `vllm.endpoint_plugins`.

vLLM calls `attach_router` while it builds its application, and `init_state` when the engine runs and nothing is
served yet. What goes wrong in the first is swallowed by vLLM, so everything happens in the second.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from secondnature.errors import SecondnatureError

__all__ = ["Endpoint"]

LOG = logging.getLogger("secondnature")


class Endpoint:
    """What vLLM asks of a plug-in that adds to its HTTP surface (`EndpointPlugin`)."""

    name = "secondnature"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def __init__(self) -> None:
        self._app: Any = None

    def attach_router(self, app: Any) -> None:
        """Remember the application. Our routes are answered in front of it: none of its own is replaced."""
        self._app = app

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Put everything together; returns when the weights are those of the home's log.

        Raises:
            SystemExit: it cannot be; one line says why, and nothing is served.
        """
        from secondnature.serve.vllm import assemble

        try:
            await assemble.begin(self._app, engine_client, state.vllm_config, args)
        except SecondnatureError as e:
            raise SystemExit(f"secondnature: {e.type}: {e}") from None
        except asyncio.CancelledError:
            raise
        except Exception as e:
            LOG.exception("secondnature could not be started inside vLLM")
            raise SystemExit(
                f"secondnature: internal error: {e!r}; please report it, with this log"
            ) from None
