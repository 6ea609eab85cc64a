"""The command line: arguments, commands, what is shown meanwhile."""
