"""A whole fleet on one hub, and a run of rounds in which processes are killed."""
