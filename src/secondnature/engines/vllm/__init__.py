"""Inside vLLM's processes: its weights in shared memory, and what follows from their being written (vLLM).

engine core    core.py          finds the worker's arena, and its epoch
               cache.py         the epoch salts the prefix cache; what overlaps a write leaves no cached block
               parent_death.py  ends when the API server is gone
               waiting.py       waits without keeping a processor busy
worker         packing.py       no weight is packed; worker.py, share.py: all parameters move into the arena
api server     client.py        asks vLLM for the answers to probes; share.py maps the arena
all            torchvision_stub.py  stands in for what CUDA builds would bring
"""
