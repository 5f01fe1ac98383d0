"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """Input, configuration or environment is wrong in a way that the user can mend.

    The message is one line that names the thing, the reason and the remedy. The command line
    prints it without a traceback and exits with status 2.
    """
