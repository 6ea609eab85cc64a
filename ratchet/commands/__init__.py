"""The subcommands, a file each: `add` tells their options, `run` does it and returns the exit code.

`run(arguments, argv)` may raise UserError, which the command line prints as one line, exit code 2.
"""
