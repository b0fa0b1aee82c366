"""`python -m pipelines.box`, see `make`; there, because a spawned process cannot import this."""

import sys

from pipelines.box.make import main
from sgcd_core.errors import SgcdError

if __name__ == "__main__":
    try:
        main()
    except SgcdError as error:
        print(f"make box: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("make box: stopped; the same command goes on", file=sys.stderr)
        sys.exit(75)
