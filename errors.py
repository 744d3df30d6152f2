"""The one exception a user's mistake raises."""


class LongslideError(Exception):
    """Something a user can put right: the message says what was wrong, with which file, and what to do.

    The command line prints the message alone; any other exception is a bug and keeps its traceback.
    """
