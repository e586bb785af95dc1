"""`python -m launch` is the console command `llm4msr`."""

import sys

from launch.main import main

if __name__ == "__main__":
    sys.exit(main())
