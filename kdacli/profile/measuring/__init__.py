"""How it is timed: calls, samples, their statistics, and the ceilings and clocks beside them."""
