"""The base class of errors that a user can fix. Imports nothing."""


class UserError(Exception):
    """An error whose message names the cause and the fix; the command line prints it without a traceback."""
