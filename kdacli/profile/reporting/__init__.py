"""Records as tables, notes and pictures."""
