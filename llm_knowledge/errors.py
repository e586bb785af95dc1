"""The one error that means: what the user gave us is wrong."""


class InputError(ValueError):
    """Bad input from the user: a file, a column, a row, an option.

    The message says what was wrong, where (file, column, row, rank) and what to do. The command
    line prints it without a traceback and exits with code 2. `shared` says that all ranks raise the
    same error, so that one of them can report it.
    """

    def __init__(self, message: str = "", shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared
