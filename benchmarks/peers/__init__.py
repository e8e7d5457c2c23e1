"""What kvstrata is measured against by `benchmarks/tiers.py`: one small file per peer, one interface.

Every peer gets its blocks from, and puts them into, the same kind of memory: rows of an arena on huge
pages. It runs in a process of its own, so that no peer's threads disturb another's and its CPU time is
its own. A peer that cannot be imported is left out with a line that says why.

None of these packages is needed by kvstrata. They do not fit beside vLLM, so give them an environment:

    python3 -m venv peers && peers/bin/pip install -e '.[bench-tiers]'
    peers/bin/pip install --no-deps lmcache==0.5.6 nixl-cu12==1.5.1   # they ask for CUDA, and run without
    peers/bin/python benchmarks/tiers.py --dir FOLDER

`torch`, which LMCache imports, should be a CPU build: give pip PyTorch's CPU index.
"""
