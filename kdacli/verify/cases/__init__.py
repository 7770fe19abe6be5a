"""What is checked: cases, how one is written down as a word, and the suites of them."""
