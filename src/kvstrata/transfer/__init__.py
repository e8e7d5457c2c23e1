"""Moving bytes: handles of running transfers, the I/O engine, aligned buffers, and file I/O."""
