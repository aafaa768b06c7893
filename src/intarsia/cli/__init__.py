"""The command line: `main`, and one file per verb.

Importing this room loads neither torch nor transformers nor numpy, so that `intarsia --help` answers at once; a verb
imports what it needs when it runs.
"""

from intarsia.cli.run import main

__all__ = ["main"]
