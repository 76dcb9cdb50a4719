"""What people have, as corrections: files, exports and logs of the shapes that are known (client).

A client of the routes and of the records: no torch, no server. `recognise` says what files are, `read_into`
reads them.
"""

from secondnature.importers.reading import Plan, Sight, Source, read_into, recognise, sight
from secondnature.importers.rows import Context, Options, Place

__all__ = ["Context", "Options", "Place", "Plan", "Sight", "Source", "read_into", "recognise", "sight"]
