"""A lossless codec for int8 matrices, GQSC: bytes <-> bytes, with random access by tile. FORMAT.md specifies it."""
