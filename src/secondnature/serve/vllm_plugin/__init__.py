"""secondnature inside vLLM: its weights in shared memory, where they are trained while they are served.

Two entry points of one name, enabled by `VLLM_PLUGINS=secondnature`. In every process of vLLM, `general.register`:
    api server     checks.py   refuses what cannot be served and trained and locks the home; nothing is loaded yet
    engine core    core.py     finds the worker's arena, and its epoch
                   cache.py    the epoch salts the prefix cache; what overlaps a write leaves no cached block
                   orphan.py   ends when the API server is gone
    worker         packing.py  no weight is packed; worker.py, share.py: all parameters move into the arena
In the API server, `endpoint.Endpoint`: maps the arena, makes the weights those of the home's log, and puts the same
routes as the local engine's on vLLM's port (door.py), with a keeper whose judge asks vLLM (engine.py).
"""
