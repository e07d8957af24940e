"""From a command line to a config and an exit code, and what a person sees."""
