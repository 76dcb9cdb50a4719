"""The address is announced before the event loop runs: who connects in between has to wait, and is not refused."""

from __future__ import annotations

import socket
from pathlib import Path

from secondnature.config import Settings
from secondnature.serve.local import _listen


def test_who_reads_the_address_is_not_refused(tmp_path: Path) -> None:
    with _listen(Settings(home=tmp_path, port=0)) as listener:
        socket.create_connection(listener.getsockname()[:2], timeout=5).close()
