"""A program that calls KDA like any other; `kda capture` records its calls without a change to it.

kda capture --target kda_kernels.api:kda_decode --calls 3 --out dumps -- python examples/capture.py
kda compare dumps
"""

from serving_loop import main

if __name__ == "__main__":
    main()
