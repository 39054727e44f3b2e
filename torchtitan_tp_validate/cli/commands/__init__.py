"""The subcommands, a file each: `add_parser` declares it, `run` runs it and returns the exit status."""
