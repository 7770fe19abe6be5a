"""Where checks run: in this process or in others, side by side, and what is compiled for them before."""
