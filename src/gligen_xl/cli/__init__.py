"""The commands of `gligen-xl`, one a module.

Each has HELP, a line; parse(parser, words), which declares and checks the arguments; and run(*what parse gave). What is
heavy is imported when it is run, so that `--help` and errors come at once.
"""
