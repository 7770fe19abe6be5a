"""What a run leaves: rows and records, and what is worked out from them without a GPU."""
