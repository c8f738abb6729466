"""What the command line does beside running the daemon: one module for each subcommand."""
