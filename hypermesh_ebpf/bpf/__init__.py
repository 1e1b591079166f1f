"""The only room that talks to bpf(2): libbpf by ctypes; programs, maps, ring buffers."""
