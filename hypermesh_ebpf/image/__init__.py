"""Source in, Image out: kernel types from BTF, BCC, and the cache of what was compiled."""
