"""The subcommands, a file each: `add` tells their options, `writes` which files they will write, as
is checked first, `run` does it and returns the exit code.

`run(arguments, argv)` may raise UserError, which the command line prints as one line, exit code 2.
"""
