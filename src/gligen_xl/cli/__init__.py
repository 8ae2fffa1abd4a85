"""The commands of `gligen-xl`, one per module.

Each module has HELP, a line; parse(parser, words), which declares and checks the options; and run(*values), which gets
what parse returned. Heavy libraries are imported by run, so that `--help` and errors come at once.
"""
