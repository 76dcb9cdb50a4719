"""secondnature: correct your model once; it stays corrected, while it keeps serving.

The package's door is light: neither torch nor transformers is imported here. Rooms are imported by name,
e.g. `from secondnature.wire import Client` to talk to a server, `secondnature.train` for the step itself.
"""

__version__ = "0.1.0"
