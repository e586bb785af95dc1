"""`python -m llm_knowledge.extraction`: an extraction by itself, for torchrun."""

import argparse
import sys

from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import EXAMPLE, add_arguments


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of this module's command line; nothing heavy is imported for it."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_knowledge.extraction",
        description="The extraction job: profiles -> prompts -> frozen model -> knowledge store.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser


def command() -> int:
    """Runs an extraction; returns 0, or 2 with one message where the input was wrong."""
    from llm_knowledge.extraction.extract import main

    try:
        return main(build_parser().parse_args())
    except InputError as error:
        if not error.shared:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(command())
