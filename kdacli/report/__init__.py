"""`kda report`: one self-contained HTML page from records of verify, profile, compile and compare."""
