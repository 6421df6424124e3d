"""The compiled kernels: C sources, the library that is built of them, and its binding."""
