"""How many times as long, as many requests or as many seeds the fault suite takes than by default; 1 in CI.

`TANDEM_FAULT_SCALE=20 pytest tests/faults` is the long run: every count that a test multiplies by SCALE grows with it.
"""

import os

SCALE = int(os.environ.get("TANDEM_FAULT_SCALE", "1"))
