"""One check: a kernel's call that is watched, what it made judged, and the memory that this takes."""
