"""`python -m glmq`, so that `torchrun -m glmq ...` works."""

from glmq.cli.app import main

if __name__ == "__main__":
    main()
