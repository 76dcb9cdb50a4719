"""secondnature inside vLLM, put together: its weights are trained in shared memory while it serves them.

Two entry points of one name, enabled by `VLLM_PLUGINS=secondnature`. In every process of vLLM, `general.register`
installs what that process needs (see `engines.vllm`); in the API server, `checks` refuses what cannot be served and
trained and locks the home before anything is loaded, and `endpoint.Endpoint` has `assemble` map the arena, make the
weights those of the home's log, and put the same routes as the local engine's on vLLM's port.
"""
