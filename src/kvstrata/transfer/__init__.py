"""Moving bytes: handles of running transfers, the executor, aligned buffers, and file I/O."""
