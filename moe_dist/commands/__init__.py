"""The command line: options, files, what is shown and how it ends."""
