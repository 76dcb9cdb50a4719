"""The room of the weights: the shared memory they live in, their versions, differences and checkpoints.

Heavy (torch); import the modules: `arena` (one shared copy), `rounding` (bf16 in place), `delta` (lossless undo),
`checkpoint` (Hugging Face directories of the home).
"""
