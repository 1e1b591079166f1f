"""``python -m hypermesh_ebpf`` is ``hmebpf``."""

from hypermesh_ebpf.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
