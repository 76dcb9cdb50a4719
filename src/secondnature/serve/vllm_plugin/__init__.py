"""secondnature inside vLLM: its weights in shared memory, where they are trained while they are served."""
