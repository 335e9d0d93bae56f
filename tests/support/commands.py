"""Commands of launch/ in the tests' own process."""

import sys
from collections.abc import Callable, Sequence


def exit_code(main: Callable[[Sequence[str]], object], *arguments: object) -> int:
    """How a command ends, which says what it refuses in a line, as `process.run_command` has it."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
