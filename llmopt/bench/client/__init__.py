"""The load client: non-blocking sockets, stamps of the kernel, parsing afterwards."""
