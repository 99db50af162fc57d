from tests.places import checkout

checkout()  # the programs of `benchmarks/` are no part of a wheel
