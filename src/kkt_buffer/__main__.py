"""Run the `kkt-buffer` command as `python -m kkt_buffer`; see `cli`."""

import sys

from kkt_buffer.cli import main

sys.exit(main())
