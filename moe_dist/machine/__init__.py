"""The machine, and what a program has set on it."""
