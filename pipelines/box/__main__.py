"""`python -m pipelines.box`, see `make`; there, because a spawned process cannot import this."""

from pipelines.box.make import main

if __name__ == "__main__":
    main()
