"""Our own grouped FP8 GEMMs in CUDA C++ on CUTLASS, compiled by the user's nvcc on first use."""
