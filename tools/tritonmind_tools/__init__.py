"""What a user runs: the `tritonmind` command and the programs behind it."""
