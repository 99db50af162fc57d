"""The same federated learning by other frameworks and by this one: `python -m benchmarks.peers`.

Each side is a process of its own, `side.py`, which runs one of the modules `by_<side>.py`. What all of them share is
`work.py`; `places.py` has the environments of the peers and the network that they run in.
"""
