"""Write the tables of docs/benchmarks.md from the committed JSON, or check that they are what it says.

python -m benchmarks.tables            writes
python -m benchmarks.tables --check    exits with 1 where the page and the JSON differ
"""

import sys

from benchmarks.tables.page import main

raise SystemExit(main(sys.argv[1:]))
