"""`python -m secondnature.cli`: the command line without the installed script (process D).

The commands start a server this way, so that it runs in the same environment as they do.
"""

import sys

from secondnature.cli import main

sys.exit(main())
