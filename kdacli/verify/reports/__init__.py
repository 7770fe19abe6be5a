"""What a run came to: tables for people, JSON for machines, JUnit for CI."""
