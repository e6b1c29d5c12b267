"""What a person can mend."""


class LimoeError(Exception):
    """The command line prints the message of such an error; any other is a bug and keeps its traceback."""
