"""Exit codes and signals."""
