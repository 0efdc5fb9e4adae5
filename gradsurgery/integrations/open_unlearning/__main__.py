"""`python -m gradsurgery.integrations.open_unlearning src/train.py ...`."""

import sys

from gradsurgery.integrations.open_unlearning import launch

if __name__ == "__main__":
    launch(sys.argv[1:])
